"""A smaller model as a GGUF file with the stored bytes of a larger one.

Entries and tensors keep their order, their types and the alignment. Only these entries change:
the numbers of blocks, experts and weights, and lists with a value for each block.
"""

import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Kind
from torch import Tensor

from apt.checkpoints.quantised import Slices
from apt.errors import AptError
from apt_plugins.gguf_files.configuration import Shapes, smaller_config
from apt_plugins.gguf_files.header import SCALARS, Entry
from apt_plugins.gguf_files.parameters import Parameter, parameters_of
from apt_plugins.gguf_files.stored import StoredFile

_BLOCK = re.compile(r"blk\.(\d+)\.")
_EXPERTS = "_exps."
_SIZE_LABEL, _BLOCK_COUNT = "general.size_label", "block_count"
_NOT_PER_BLOCK = ("rope.dimension_sections",)
_CONFIGURED = {
    "expert_used_count": "num_experts_per_tok", "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
}  # fmt: skip
"""Entries that may change with the number of experts, and their fields of configurations."""
_LITE_BLOCK_COUNTS = (26, 27)
"""The only numbers of blocks with which llama.cpp opens a deepseek2 without ``q_lora_rank``."""
_KIND_FIELDS = ("layer_types", "no_rope_layers", "mlp_layer_types")
"""Fields of configurations with the kind of each block."""


@dataclass(frozen=True)
class SlicedTensor:
    """A tensor of the smaller file.

    Attributes:
        name: its name.
        source: the tensor of the original that it is made from.
        rows: the kept entries of the first dimension of the source; None for all.
        values: returns new values in fp32; None for the bytes of the source.
    """

    name: str
    source: str
    rows: Sequence[int] | None = None
    values: Callable[[], Tensor] | None = None


def _check_rows(file: StoredFile, name: str, parameter: Parameter) -> None:
    """Raise `AptError` if the rows of a parameter cannot be cut out of a file."""
    hint = "remove experts or blocks, or convert the file"
    if not parameter.by_rows:
        raise AptError(f"the rows of {name} have another order in {file.path}", hint)
    for tensor in parameter.tensors:
        block, _ = gguf.GGML_QUANT_SIZES[file.type_of(tensor)]
        if len(file.shapes[tensor]) == 1 and block > 1:
            kind = file.type_of(tensor).name
            raise AptError(f"the entries of {tensor} share scales ({kind}) in {file.path}", hint)


def plan_slices(
    file: StoredFile, config: Any, parameters: Mapping[str, Parameter], slices: Slices
) -> tuple[list[SlicedTensor], dict[str, Any]]:
    """The tensors of the smaller model, and the entries that change.

    Raises:
        AptError: the format cannot express the smaller model.
    """
    if file.entries.get("nextn_predict_layers"):
        message = f"{file.path} has blocks that predict further tokens, whose experts nothing chose"
        raise AptError(message, "get a file without them")
    tensors = _tensors(file, parameters, slices)
    changes = _changed_entries(file, config, slices, tensors)
    _check_types(file, tensors)
    return tensors, changes


def write_sliced(
    file: StoredFile, config: Any, parameters: Mapping[str, Parameter], slices: Slices, target: Path
) -> None:
    """Write the file of a smaller model, and compare it with the original.

    Raises:
        AptError: the format cannot express the smaller model.
    """
    tensors, changes = plan_slices(file, config, parameters, slices)
    try:
        with target.open("xb") as output:
            digests = _write(output, file, changes, tensors)
        _verify(file, target, changes, tensors, digests)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _tensors(
    file: StoredFile, parameters: Mapping[str, Parameter], slices: Slices
) -> list[SlicedTensor]:
    """The tensors of the smaller file, in the order of the original."""
    renamed = _renamed(file, slices.blocks)
    chosen = _tensors_of_parameters(file, parameters, slices, renamed)
    used = {tensor for parameter in parameters.values() for tensor in parameter.tensors}
    return [
        chosen[source] if source in used else SlicedTensor(name, source)
        for source, name in renamed.items()
        if source in chosen or source not in used
    ]


def _renamed(file: StoredFile, blocks: Sequence[int]) -> dict[str, str]:
    """The names of tensors in the smaller file by their names in the original."""
    count = int(file.entries[_BLOCK_COUNT])
    if not blocks or list(blocks) != sorted(set(blocks) & set(range(count))):
        raise AptError(f"{file.path} has blocks 0 to {count - 1}", f"not {list(blocks)}")
    new_indices = {block: new_index for new_index, block in enumerate(blocks)}
    renamed = dict[str, str]()
    for name in file.shapes:
        match = _BLOCK.match(name)
        if match is None:
            renamed[name] = name
        elif int(match[1]) in new_indices:
            renamed[name] = f"blk.{new_indices[int(match[1])]}.{name[match.end() :]}"
    return renamed


def _tensors_of_parameters(
    file: StoredFile,
    parameters: Mapping[str, Parameter],
    slices: Slices,
    renamed: Mapping[str, str],
) -> dict[str, SlicedTensor]:
    """The tensors of the parameters of the smaller model, by their names in the original."""
    shapes = {
        renamed[tensor]: (len(slices.rows.get(name, range(parameter.shape[0]))), *shape[1:])
        if parameter.by_rows else shape
        for name, source in slices.sources.items()
        for parameter in [parameters[source]]
        for tensor in parameter.tensors
        for shape in [file.shapes[tensor]]
        if tensor in renamed
    }  # fmt: skip
    smaller = parameters_of(slices.config, file.architecture, shapes)
    chosen = dict[str, SlicedTensor]()
    for name, parameter in smaller.items():
        if parameter is None or name not in slices.sources:
            message = f"{name} of the smaller model is made of no tensor of {file.path}"
            raise AptError(message, "only experts and blocks are removed from a GGUF file")
        source, rows = slices.sources[name], slices.rows.get(name)
        original = parameters[source]
        if tuple(map(renamed.get, original.tensors)) != parameter.tensors:
            message = f"{name} of the smaller model cannot be made of {source}"
            raise AptError(message, "blocks keep their order in a GGUF file")
        if rows is not None:
            _check_rows(file, source, original)
        new_values = _new_values(name, parameter, slices.values)
        pairs = zip(original.tensors, parameter.tensors, strict=True)
        for index, (tensor, new_name) in enumerate(pairs):
            chosen[tensor] = SlicedTensor(
                new_name, tensor, rows, new_values and partial(new_values, index)
            )
    return chosen


def _new_values(
    name: str, parameter: Parameter, values: Mapping[str, Tensor]
) -> Callable[[int], Tensor] | None:
    """A function from the index of a parameter's tensor to its new values; None if it has none."""
    compress = parameter.compress
    if name not in values:
        return None
    if compress is None:
        raise AptError(f"new values of {name} cannot be written in a GGUF file", "keep them")

    def values_of_tensor(index: int) -> Tensor:
        value = values[name].detach().to("cpu", torch.float32)
        return compress(value.reshape(parameter.shape))[index]

    return values_of_tensor


def _check_types(file: StoredFile, tensors: Sequence[SlicedTensor]) -> None:
    """Raise `AptError` if new values cannot be rounded to the type of their tensor."""
    for tensor in tensors:
        if tensor.values is not None:
            kind = file.type_of(tensor.source)
            try:
                gguf.quantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][0]), np.float32), kind)
            except NotImplementedError as error:
                message = f"{tensor.source} is of type {kind.name}, to which no value is rounded"
                hint = "leave out the compensation, or convert the file to q8_0 or q4_0"
                raise AptError(message, hint) from error


def _changed_entries(
    file: StoredFile, config: Any, slices: Slices, tensors: Sequence[SlicedTensor]
) -> dict[str, Any]:
    """The entries with new values, by their keys with the name of the architecture.

    Raises:
        AptError: the entries of a GGUF file cannot express the smaller model.
    """
    before, after = dict(file.entries), dict(file.entries)
    count, kept = int(before[_BLOCK_COUNT]), list(slices.blocks)
    after[_BLOCK_COUNT] = len(kept)
    per_block = {
        key: value for key, value in before.items()
        if isinstance(value, list) and len(value) == count and key not in _NOT_PER_BLOCK
    }  # fmt: skip
    after |= {key: [value[block] for block in kept] for key, value in per_block.items()}
    if leading := before.get("leading_dense_block_count"):
        after["leading_dense_block_count"] = sum(block < leading for block in kept)
    if slices.experts is not None:
        after["expert_count"] = slices.experts
    for key, name in _CONFIGURED.items():
        value = getattr(slices.config, name, None)
        if isinstance(value, int) and isinstance(before.get(key), int):
            after[key] = value
    is_lite = file.architecture == "deepseek2" and "attention.q_lora_rank" not in before
    if is_lite and len(kept) not in (count, *_LITE_BLOCK_COUNTS):
        message = f"llama.cpp opens {file.path} with 26 or 27 blocks only"
        raise AptError(message, "remove experts, or another number of blocks", ("drop",))
    shapes = _shapes(file, tensors)
    kinds = getattr(config, "layer_types", None) if per_block else None
    output_config = smaller_config(
        file, config, after, shapes, kinds and [kinds[block] for block in kept]
    )
    _check_kinds(file, config, slices, output_config)
    changes = {
        f"{file.architecture}.{key}": value for key, value in after.items() if value != before[key]
    }
    if _SIZE_LABEL in file.header.entries and shapes != file.shapes:
        changes[_SIZE_LABEL] = _size_label(shapes)
    return changes


def _shapes(file: StoredFile, tensors: Sequence[SlicedTensor]) -> dict[str, tuple[int, ...]]:
    shapes = dict[str, tuple[int, ...]]()
    for tensor in tensors:
        first, *rest = file.shapes[tensor.source]
        shapes[tensor.name] = (first if tensor.rows is None else len(tensor.rows), *rest)
    return shapes


def _check_kinds(file: StoredFile, config: Any, slices: Slices, output_config: Any) -> None:
    """Raise if llama.cpp would compute another function than the smaller model.

    Args:
        config: the configuration of the original.
        output_config: the configuration that a loader would read from the smaller file.
    """
    if _kinds_of(config, slices.blocks) != _kinds_of(
        output_config, range(output_config.num_hidden_layers)
    ):
        message = f"the blocks of {file.path} are of several kinds, which follow from positions"
        raise AptError(message, "drop blocks so that the kinds keep their pattern", ("drop",))
    original, output, wanted = config.to_dict(), output_config.to_dict(), slices.config.to_dict()
    unchanging = (
        original.keys() & output.keys() - _DERIVED_FIELDS if slices.experts is not None else set()
    )
    for name in sorted(unchanging):
        if original[name] != output[name]:
            message = f"llama.cpp computes {name} of {file.architecture} from the number of experts"
            raise AptError(message, f"{file.path} keeps its number of experts")
    for name in sorted(output.keys() & wanted.keys() & _SIZE_FIELDS):
        if wanted[name] != output[name]:
            message = f"the smaller model of {file.path} has another {name}: {wanted[name]}"
            raise AptError(message, "only experts and blocks are removed from a GGUF file")


def _kinds_of(config: Any, blocks: Sequence[int]) -> list[list[Any]]:
    """The kinds of some blocks: a list for each field of the configuration that has kinds."""
    fields = (getattr(config, name, None) for name in _KIND_FIELDS)
    kinds = [[kinds[block] for block in blocks] for kinds in fields if isinstance(kinds, list)]
    if isinstance(layers := getattr(config, "moe_layers", None), list):
        kinds.append([block in layers for block in blocks])
    return kinds


_DERIVED_FIELDS = {
    *_KIND_FIELDS, *_CONFIGURED.values(), "moe_layers", "num_hidden_layers", "num_experts",
    "num_local_experts", "n_routed_experts", "first_k_dense_replace", "max_window_layers",
}  # fmt: skip
"""Fields that may change if the numbers of blocks and experts do."""
_SIZE_FIELDS = {
    "num_hidden_layers", "num_experts", "num_local_experts", "n_routed_experts", "hidden_size",
    "intermediate_size", "moe_intermediate_size", "num_attention_heads", "num_key_value_heads",
    "first_k_dense_replace", "vocab_size", "num_experts_per_tok", "n_group", "topk_group",
}  # fmt: skip
"""Fields that must be equal in the smaller model and in the configuration of its file."""


def _size_label(shapes: Shapes) -> str:
    """The label of a model's size, such as ``8x7B``."""
    total = sum(map(prod, shapes.values()))
    experts = {name: shape for name, shape in shapes.items() if _EXPERTS in name}
    if not experts:
        return str(gguf.size_label(total, total, 0, 0))
    count, routed = next(iter(experts.values()))[0], sum(map(prod, experts.values()))
    return str(gguf.size_label(total, total - routed, routed // count, count))


def _write(
    output: BinaryIO, file: StoredFile, changes: Mapping[str, Any], tensors: Sequence[SlicedTensor]
) -> list[bytes]:
    """Write a file; returns the digests of the tensors."""
    entries, version = file.header.entries, file.header.version
    output.write(struct.pack("<IIQQ", gguf.GGUF_MAGIC, version, len(tensors), len(entries)))
    for key, entry in entries.items():
        output.write(_entry_bytes(key, entry, changes[key]) if key in changes else entry.raw)
    alignment, offset = file.header.alignment, 0
    shapes = _shapes(file, tensors)
    for tensor in tensors:
        shape, kind = shapes[tensor.name], file.type_of(tensor.source)
        output.write(_string_bytes(tensor.name) + struct.pack("<I", len(shape)))
        output.write(struct.pack(f"<{len(shape)}QIQ", *reversed(shape), kind, offset))
        size = file.row_bytes(tensor.source) * shape[0]
        offset += size + -size % alignment
    output.write(bytes(-output.tell() % alignment))
    digests = []
    for tensor in tensors:
        digest = blake2b(digest_size=16)
        for data in _tensor_bytes(file, tensor):
            output.write(data)
            digest.update(data)
        output.write(bytes(-output.tell() % alignment))
        digests.append(digest.digest())
    return digests


def _entry_bytes(key: str, entry: Entry, value: Any) -> bytes:
    """An entry with another value of the same kind."""
    header = _string_bytes(key) + struct.pack("<I", entry.kind)
    if entry.item_kind is not None:
        codes = f"<IQ{len(value)}{SCALARS[entry.item_kind]}"
        return header + struct.pack(codes, entry.item_kind, len(value), *value)
    if entry.kind is Kind.STRING:
        return header + _string_bytes(value)
    return header + struct.pack(f"<{SCALARS[entry.kind]}", value)


def _string_bytes(text: str) -> bytes:
    """A string as GGUF stores it: the number of its bytes, and the bytes."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _tensor_bytes(file: StoredFile, tensor: SlicedTensor) -> Iterator[bytes]:
    """The bytes of a tensor of the smaller file, part by part."""
    if tensor.values is not None:
        values = np.ascontiguousarray(tensor.values().numpy())
        with np.errstate(over="ignore"):
            data = gguf.quantize(values, file.type_of(tensor.source))
        if file.type_of(tensor.source) is Type.F16 and not np.isfinite(data).all():
            message = f"new values of {tensor.source} are beyond 65,504, the largest of f16"
            raise AptError(message, "leave out the compensation")
        yield np.ascontiguousarray(data).tobytes()
    elif tensor.rows is None:
        yield from file.chunks(tensor.source, 0, file.shapes[tensor.source][0])
    else:
        for row in tensor.rows:
            yield from file.chunks(tensor.source, row, row + 1)


def _verify(
    file: StoredFile,
    target: Path,
    changes: Mapping[str, Any],
    tensors: Sequence[SlicedTensor],
    digests: Sequence[bytes],
) -> None:
    """Raise if the file was not written as planned."""
    output = StoredFile(target)
    for key, entry in file.header.entries.items():
        expected = _entry_bytes(key, entry, changes[key]) if key in changes else entry.raw
        if output.header.entries[key].raw != expected:
            raise RuntimeError(f"{key} of {target} was not written as it is")
    kinds = [file.type_of(tensor.source) for tensor in tensors]
    if list(output.shapes.items()) != list(_shapes(file, tensors).items()) or kinds != [
        output.type_of(name) for name in output.shapes
    ]:
        raise RuntimeError(f"{target} was not written as it is")
    for name, digest in zip(output.shapes, digests, strict=True):
        output_digest = blake2b(digest_size=16)
        for data in output.chunks(name, 0, output.shapes[name][0]):
            output_digest.update(data)
        if output_digest.digest() != digest:
            raise RuntimeError(f"{name} of {target} was not written as it is")
