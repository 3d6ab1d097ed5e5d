"""How each parameter of a model of transformers is made of the tensors of a GGUF file."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS

from apt.checkpoints.architecture import without_weights
from apt_plugins.gguf_files.layouts import CHANGES
from apt_plugins.gguf_files.writing import Array

try:
    from transformers.core_model_loading import WeightConverter, rename_source_key
    from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS as _MAPPINGS
except ImportError:  # before transformers 5.24
    _MAPPINGS = {}

MAPPED: Mapping[str, Any] = _MAPPINGS
"""The functions that make transformers' own mapping for a configuration, by architecture."""

Shapes = Mapping[str, tuple[int, ...]]
Expand = Callable[[Sequence[Tensor]], Tensor]
"""Makes a parameter of the tensors of a file, in fp32."""
Compress = Callable[[Tensor], Sequence[Tensor]]
"""Makes the tensors of a file of a parameter, in fp32."""

_BLOCK = re.compile(r"\.(\d+)\.")
_SUFFIXES = (".weight", ".bias")
_STACKS = (".gate_up_proj", ".down_proj", ".gate_up_proj_bias", ".down_proj_bias")
_RENAMED = {
    "router.weight": "ffn_gate_inp.weight", "router.bias": "ffn_gate_inp.bias",
    "e_score_correction_bias": "exp_probs_b.bias",
    "shared_mlp.output_linear.weight": "ffn_down_shexp.weight",
}  # fmt: skip
_TRANSPOSED, _INTERLEAVED = ("gpt_oss", "llama4_text"), ("gpt_oss",)
_ROTARY = ("attn_q.", "attn_k.")
_REORDERED = {
    "llama": _ROTARY, "granitemoe": _ROTARY, "bloom": ("attn_qkv.",), "gpt2": ("weight",),
}  # fmt: skip
"""The tensors whose rows have another order than in transformers, by parts of their names."""
_LLAMA = "llama"  # its conversion also serves other architectures with interleaved rotary pairs


@dataclass(frozen=True)
class Parameter:
    """A parameter, and the tensors of a file that it is made of.

    Attributes:
        shape: the shape of the parameter.
        tensors: the names of the tensors.
        expand: makes the parameter of the tensors.
        compress: makes the tensors of the parameter; None if no inverse of ``expand`` is known.
        by_rows: True if each index of the first dimension of the parameter is made of the same
            index of the first dimension of each tensor, so that rows can be cut out.
    """

    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    expand: Expand
    compress: Compress | None
    by_rows: bool = True


def parameters_of(config: Any, architecture: str, shapes: Shapes) -> dict[str, Parameter | None]:
    """The parameters of the model of a configuration, by name.

    Args:
        shapes: the shapes of the tensors of the file.

    Returns:
        The parameters; None for those that have no tensor of the right size in the file.
    """
    with torch.device("meta"):
        module = without_weights(config, trust_remote_code=False)
    state = module.state_dict()
    if architecture in MAPPED:
        return _mapped_parameters(module, config, MAPPED[architecture](config), shapes)
    architecture_id = next(
        member for member, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture
    )
    names = gguf.get_tensor_name_map(architecture_id, config.num_hidden_layers)
    tied = {"lm_head.weight"} if getattr(config, "tie_word_embeddings", False) else set[str]()
    parameters = dict[str, Parameter | None]()
    for name in [name for name in state if name not in tied]:
        shape = tuple(state[name].shape)
        parameter = _composite(name, config, shape, shapes)
        if parameter is None and (stored := _stored_name(name, names, shapes)):
            parameter = _of_one_tensor(stored, shape, architecture, config, shapes)
        is_stored = parameter is not None and all(tensor in shapes for tensor in parameter.tensors)
        parameters[name] = parameter if is_stored else None
    return parameters


def _mapped_parameters(
    module: Any, config: Any, mapping: Sequence[Any], shapes: Shapes
) -> dict[str, Parameter | None]:
    """`parameters_of` for an architecture for which transformers has a mapping."""
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
    converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    sources = dict[str, dict[str, str]]()
    for stored in shapes:
        name, pattern = rename_source_key(stored, renamings, converters)
        if name in state:
            sources.setdefault(name, {})[pattern or ""] = stored
    tied = {"lm_head.weight"} if getattr(config, "tie_word_embeddings", False) else set[str]()
    return {
        name: _converted(sources[name], converter_of, shape, config, shapes)
        if name in sources
        else None
        for name, shape in state.items()
        if name not in tied
    }


def _converted(
    sources: Mapping[str, str],
    converter_of: Mapping[str, Any],
    shape: tuple[int, ...],
    config: Any,
    shapes: Shapes,
) -> Parameter:
    """A parameter that an operation of transformers makes of one or several tensors.

    Args:
        sources: the names of the tensors, by the patterns that match them.
        converter_of: the operations by pattern; a tensor without one is the parameter itself.
    """
    converter = converter_of.get(next(iter(sources)))
    if converter is None:
        (stored,) = sources.values()
        return Parameter(shape, (stored,), lambda inputs: inputs[0], lambda value: [value])
    patterns = [pattern for pattern in converter.source_patterns if pattern in sources]

    def expand(inputs: Sequence[Tensor]) -> Tensor:
        values: dict[str, Any] = dict(zip(patterns, inputs, strict=True))
        for operation in converter.operations:
            values = operation.convert(
                values, source_patterns=patterns, target_patterns=converter.target_patterns,
                config=config,
            )  # fmt: skip
        (output,) = values.values()
        result: Tensor = output[0] if isinstance(output, list) else output
        return result

    joined = len(patterns) == 2 and len(shape) == 3

    def compress(value: Tensor) -> Sequence[Tensor]:
        return [part.contiguous() for part in value.chunk(2, 1)]

    tensors = tuple(sources[pattern] for pattern in patterns)
    return Parameter(shape, tensors, expand, compress if joined else None, by_rows=joined)


def _stored_name(name: str, names: gguf.TensorNameMap, shapes: Shapes) -> str | None:
    """The name of the tensor of a parameter that is not stacked."""
    block = _BLOCK.search(name)
    for suffix, stored in _RENAMED.items():
        if block and name.endswith(f".{suffix}"):
            return f"blk.{block[1]}.{stored}"
    parts = name.split(".")
    for alias in (name, ".".join(parts[1:])):  # some names in the table lack the model's prefix
        base_name = names.get_name(alias, try_suffixes=_SUFFIXES)
        for candidate in (base_name, f"{base_name}.weight"):
            if base_name is not None and candidate in shapes:
                return candidate
    return None


def _of_one_tensor(
    stored: str, shape: tuple[int, ...], architecture: str, config: Any, shapes: Shapes
) -> Parameter | None:
    """A parameter of one tensor, which transformers and llama.cpp may store differently."""
    if np.prod(shapes[stored]) != np.prod(shape):
        return None
    architecture = _LLAMA if architecture == "granitemoe" else architecture
    reordered = any(part in stored for part in _REORDERED.get(architecture, ()))
    by_rows = not reordered and shapes[stored][0] == shape[0]
    processor = TENSOR_PROCESSORS.get(architecture)
    if processor is None or "moe" in architecture:
        return Parameter(shape, (stored,), lambda inputs: inputs[0].reshape(-1, *shape[1:]),
                         lambda value: [value.reshape(shapes[stored])], by_rows)  # fmt: skip
    values = config.to_dict()

    def expand(inputs: Sequence[Tensor]) -> Tensor:
        parsed: dict[str, Any] = {"tensors": {}, "config": values}
        output = processor(config=values).process(
            inputs[0].numpy(), stored, tensor_key_mapping={}, parsed_parameters=parsed
        )
        if output.name is None:  # for GPT-2's head, the result is in the record
            return Tensor(next(iter(parsed["tensors"].values()))).reshape(-1, *shape[1:])
        return torch.from_numpy(np.ascontiguousarray(output.weights)).reshape(-1, *shape[1:])

    change = CHANGES.get(architecture)

    def compress(value: Tensor) -> Sequence[Tensor]:
        assert change is not None
        changed: Array = change(stored, value.numpy(), config)
        return [torch.from_numpy(np.ascontiguousarray(changed)).reshape(shapes[stored])]

    return Parameter(shape, (stored,), expand, compress if change else None, by_rows)


def _composite(name: str, config: Any, shape: tuple[int, ...], shapes: Shapes) -> Parameter | None:
    """A parameter that is a stack of experts, or is made of several tensors."""
    match = _BLOCK.search(name)
    if match is None:
        return None
    block = f"blk.{match[1]}."
    if name.endswith(tuple(f".experts{suffix}" for suffix in _STACKS)):
        return _expert_stack(name, block, config.model_type, shape, shapes)
    if name.endswith(".shared_mlp.input_linear.weight"):
        pair = tuple(f"{block}ffn_{part}_shexp.weight" for part in ("gate", "up"))
        return Parameter(
            shape, pair, lambda inputs: torch.cat(list(inputs)), lambda value: value.chunk(2), False
        )
    if name.endswith(".kv_b_proj.weight") and f"{block}attn_k_b.weight" in shapes:
        return _latent_projection(block, shape, shapes)
    return None


def _expert_stack(
    name: str, block: str, model_type: str, shape: tuple[int, ...], shapes: Shapes
) -> Parameter:
    """The matrices or biases of all experts of a block."""
    suffix = ".bias" if name.endswith("_bias") else ".weight"
    transposed = suffix == ".weight" and model_type in _TRANSPOSED
    if ".down_proj" in name:
        return Parameter(
            shape, (f"{block}ffn_down_exps{suffix}",),
            lambda inputs: inputs[0].mT.contiguous() if transposed else inputs[0],
            lambda value: [value.mT.contiguous() if transposed else value],
        )  # fmt: skip
    interleaved = model_type in _INTERLEAVED
    fused = f"{block}ffn_gate_up_exps{suffix}"

    def expand(inputs: Sequence[Tensor]) -> Tensor:
        gate, up = inputs[0].chunk(2, 1) if len(inputs) == 1 else inputs
        joined = (
            torch.stack([gate, up], 2).flatten(1, 2) if interleaved else torch.cat([gate, up], 1)
        )
        return joined.mT.contiguous() if transposed else joined

    def compress(value: Tensor) -> Sequence[Tensor]:
        rows = value.mT if transposed else value
        pair = (rows[:, ::2], rows[:, 1::2]) if interleaved else rows.chunk(2, 1)
        return [torch.cat(pair, 1)] if fused in shapes else [part.contiguous() for part in pair]

    tensors = tuple(f"{block}ffn_{part}_exps{suffix}" for part in ("gate", "up"))
    return Parameter(shape, (fused,) if fused in shapes else tensors, expand, compress)


def _latent_projection(block: str, shape: tuple[int, ...], shapes: Shapes) -> Parameter:
    """The matrix from latent vectors to keys and values, which a file stores as two tensors.

    The tensor of keys is (heads, latent, key), transposed; that of values (heads, value, latent).
    """
    tensors = (f"{block}attn_k_b.weight", f"{block}attn_v_b.weight")
    heads, _, key_size = shapes[tensors[0]]

    def expand(inputs: Sequence[Tensor]) -> Tensor:
        return torch.cat([inputs[0].mT, inputs[1]], 1).reshape(shape)

    def compress(value: Tensor) -> Sequence[Tensor]:
        head_rows = value.reshape(heads, -1, shape[1])
        return [head_rows[:, :key_size].mT.contiguous(), head_rows[:, key_size:].contiguous()]

    return Parameter(shape, tensors, expand, compress, by_rows=False)
