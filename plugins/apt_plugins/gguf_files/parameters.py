"""The parameters of a model of transformers, as they lie in the tensors of a GGUF file."""

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
"""Functions of a configuration to transformers' own mapping, by architecture."""

Shapes = Mapping[str, tuple[int, ...]]
Expand = Callable[[Sequence[Tensor]], Tensor]
"""A function of the tensors of a file, in fp32, to the parameter."""
Compress = Callable[[Tensor], Sequence[Tensor]]
"""A function of the parameter, in fp32, to the tensors of a file."""

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
"""Parts of the names of tensors whose rows have another order than in transformers."""
_LLAMA = "llama"  # the conversion of architectures whose rotary pairs llama.cpp interleaves


@dataclass(frozen=True)
class Parameter:
    """A parameter, as it lies in the tensors of a file.

    Attributes:
        shape: the shape of the parameter.
        tensors: the names of the tensors.
        expand: makes the parameter of the tensors.
        compress: makes the tensors of the parameter; None if that is not known.
        by_rows: True if an entry of the first dimension of the parameter is made of the same entry
            of the first dimension of each tensor.
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
        return _by_transformers(module, config, MAPPED[architecture](config), shapes)
    kind = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tied = {"lm_head.weight"} if getattr(config, "tie_word_embeddings", False) else set[str]()
    found = dict[str, Parameter | None]()
    for name in [name for name in state if name not in tied]:
        shape = tuple(state[name].shape)
        parameter = _special(name, config, shape, shapes)
        if parameter is None and (stored := _stored_name(name, names, shapes)):
            parameter = _plain(stored, shape, architecture, config, shapes)
        is_whole = parameter is not None and all(each in shapes for each in parameter.tensors)
        found[name] = parameter if is_whole else None
    return found


def _by_transformers(
    module: Any, config: Any, mapping: Sequence[Any], shapes: Shapes
) -> dict[str, Parameter | None]:
    """The parameters of an architecture for which transformers has a mapping of its own."""
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
    owners = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    sources = dict[str, dict[str, str]]()
    for stored in shapes:
        name, pattern = rename_source_key(stored, renamings, converters)
        if name in state:
            sources.setdefault(name, {})[pattern or ""] = stored
    tied = {"lm_head.weight"} if getattr(config, "tie_word_embeddings", False) else set[str]()
    return {
        name: _converted(sources[name], owners, shape, config, shapes) if name in sources else None
        for name, shape in state.items()
        if name not in tied
    }


def _converted(
    sources: Mapping[str, str],
    owners: Mapping[str, Any],
    shape: tuple[int, ...],
    config: Any,
    shapes: Shapes,
) -> Parameter:
    """A parameter that transformers makes of the tensors of some patterns."""
    converter = owners.get(next(iter(sources)))
    if converter is None:
        (stored,) = sources.values()
        return Parameter(shape, (stored,), lambda given: given[0], lambda value: [value])
    patterns = [pattern for pattern in converter.source_patterns if pattern in sources]

    def expand(given: Sequence[Tensor]) -> Tensor:
        values: dict[str, Any] = dict(zip(patterns, given, strict=True))
        for operation in converter.operations:
            values = operation.convert(
                values, source_patterns=patterns, target_patterns=converter.target_patterns,
                config=config,
            )  # fmt: skip
        (made,) = values.values()
        result: Tensor = made[0] if isinstance(made, list) else made
        return result

    joined = len(patterns) == 2 and len(shape) == 3

    def compress(value: Tensor) -> Sequence[Tensor]:
        return [part.contiguous() for part in value.chunk(2, 1)]

    tensors = tuple(sources[pattern] for pattern in patterns)
    return Parameter(shape, tensors, expand, compress if joined else None, by_rows=joined)


def _stored_name(name: str, names: gguf.TensorNameMap, shapes: Shapes) -> str | None:
    """The name of the tensor of a parameter that is not stacked."""
    block = _BLOCK.search(name)
    for end, stored in _RENAMED.items():
        if block and name.endswith(f".{end}"):
            return f"blk.{block[1]}.{stored}"
    parts = name.split(".")
    for known in (name, ".".join(parts[1:])):  # some names in the table lack the model's prefix
        found = names.get_name(known, try_suffixes=_SUFFIXES)
        for candidate in (found, f"{found}.weight"):
            if found is not None and candidate in shapes:
                return candidate
    return None


def _plain(
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
        return Parameter(shape, (stored,), lambda given: given[0].reshape(-1, *shape[1:]),
                         lambda value: [value.reshape(shapes[stored])], by_rows)  # fmt: skip
    values = config.to_dict()

    def expand(given: Sequence[Tensor]) -> Tensor:
        held: dict[str, Any] = {"tensors": {}, "config": values}
        made = processor(config=values).process(
            given[0].numpy(), stored, tensor_key_mapping={}, parsed_parameters=held
        )
        if made.name is None:  # GPT-2's head is handed over in another way
            return Tensor(next(iter(held["tensors"].values()))).reshape(-1, *shape[1:])
        return torch.from_numpy(np.ascontiguousarray(made.weights)).reshape(-1, *shape[1:])

    change = CHANGES.get(architecture)

    def compress(value: Tensor) -> Sequence[Tensor]:
        assert change is not None
        changed: Array = change(stored, value.numpy(), config)
        return [torch.from_numpy(np.ascontiguousarray(changed)).reshape(shapes[stored])]

    return Parameter(shape, (stored,), expand, compress if change else None, by_rows)


def _special(name: str, config: Any, shape: tuple[int, ...], shapes: Shapes) -> Parameter | None:
    """A parameter that is a stack of experts, or is made of several tensors."""
    found = _BLOCK.search(name)
    if found is None:
        return None
    block = f"blk.{found[1]}."
    if name.endswith(tuple(f".experts{end}" for end in _STACKS)):
        return _stack(name, block, config.model_type, shape, shapes)
    if name.endswith(".shared_mlp.input_linear.weight"):
        pair = tuple(f"{block}ffn_{part}_shexp.weight" for part in ("gate", "up"))
        return Parameter(
            shape, pair, lambda given: torch.cat(list(given)), lambda value: value.chunk(2), False
        )
    if name.endswith(".kv_b_proj.weight") and f"{block}attn_k_b.weight" in shapes:
        return _latent(block, shape, shapes)
    return None


def _stack(
    name: str, block: str, model_type: str, shape: tuple[int, ...], shapes: Shapes
) -> Parameter:
    """The matrices or biases of all experts of a block."""
    end = ".bias" if name.endswith("_bias") else ".weight"
    transposed = end == ".weight" and model_type in _TRANSPOSED
    if ".down_proj" in name:
        return Parameter(
            shape, (f"{block}ffn_down_exps{end}",),
            lambda given: given[0].mT.contiguous() if transposed else given[0],
            lambda value: [value.mT.contiguous() if transposed else value],
        )  # fmt: skip
    interleaved = model_type in _INTERLEAVED
    fused = f"{block}ffn_gate_up_exps{end}"

    def expand(given: Sequence[Tensor]) -> Tensor:
        gate, up = given[0].chunk(2, 1) if len(given) == 1 else given
        joined = (
            torch.stack([gate, up], 2).flatten(1, 2) if interleaved else torch.cat([gate, up], 1)
        )
        return joined.mT.contiguous() if transposed else joined

    def compress(value: Tensor) -> Sequence[Tensor]:
        rows = value.mT if transposed else value
        pair = (rows[:, ::2], rows[:, 1::2]) if interleaved else rows.chunk(2, 1)
        return [torch.cat(pair, 1)] if fused in shapes else [part.contiguous() for part in pair]

    tensors = tuple(f"{block}ffn_{part}_exps{end}" for part in ("gate", "up"))
    return Parameter(shape, (fused,) if fused in shapes else tensors, expand, compress)


def _latent(block: str, shape: tuple[int, ...], shapes: Shapes) -> Parameter:
    """The matrix from latent vectors to keys and values, which llama.cpp keeps apart per head.

    The keys' part (heads, latent, key) is transposed, the values' part is (heads, value, latent).
    """
    tensors = (f"{block}attn_k_b.weight", f"{block}attn_v_b.weight")
    heads, _, key = shapes[tensors[0]]

    def expand(given: Sequence[Tensor]) -> Tensor:
        return torch.cat([given[0].mT, given[1]], 1).reshape(shape)

    def compress(value: Tensor) -> Sequence[Tensor]:
        each = value.reshape(heads, -1, shape[1])
        return [each[:, :key].mT.contiguous(), each[:, key:].contiguous()]

    return Parameter(shape, tensors, expand, compress, by_rows=False)
