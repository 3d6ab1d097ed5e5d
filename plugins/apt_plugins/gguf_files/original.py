"""The plan of a file for a model that was made from a GGUF file: most of it is copied.

The metadata, the tokenizer and the order of the tensors are those of the original. An entry for
which the configuration of the model has another value is written anew, by the mapping with which
transformers reads the original.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Kind
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from apt.errors import AptError, described
from apt.extending import Exportable
from apt_plugins.gguf_files.layouts import architecture_of
from apt_plugins.gguf_files.number_types import file_type
from apt_plugins.gguf_files.tensors import planned_of, tensor_names
from apt_plugins.gguf_files.writing import Planned

_BLOCK = re.compile(r"blk\.(\d+)\.")
_ARCHITECTURE, _TYPE = "general.architecture", "general.file_type"
_SIZE = "general.size_label"
_IN_TURN = ("gemma2", "gemma3")  # whose blocks have windows in turn


def from_original(
    model: Exportable, target: Path, kind: Type
) -> tuple[gguf.GGUFWriter, list[Planned]]:
    """A writer with the metadata of the original, and the tensors to write.

    Raises:
        AptError: the original is damaged, or not that of the model; or the format cannot express
            the model.
    """
    assert model.original is not None
    reader = _read(model.original)
    architecture = architecture_of(model)
    if (own := _text(reader, _ARCHITECTURE)) != architecture:
        raise _other(model, f"its architecture is {own}, not {architecture}")
    changes = {**_changes(model, reader, architecture), _TYPE: int(file_type(kind))}
    tensors = list(_tensors(model, reader, architecture, kind))
    before = sum(int(tensor.n_elements) for tensor in reader.tensors)
    after = sum(int(np.prod(planned.shape)) for planned in tensors)
    if after != before and _SIZE in reader.fields:
        changes[_SIZE] = gguf.size_label(after, after, 0, 0)
    writer = gguf.GGUFWriter(target, architecture)
    writer.data_alignment = int(reader.alignment)
    _copy(reader, writer, changes)
    return writer, tensors


def _read(path: Path) -> gguf.GGUFReader:
    try:
        reader = gguf.GGUFReader(str(path))
    except (ValueError, KeyError, IndexError, OSError, OverflowError) as error:
        fault = f"{path} is not a GGUF file, or is damaged: {described(error)}"
        raise AptError(fault, "get it again", ("source",)) from error
    if reader.endianess is not gguf.GGUFEndian.LITTLE or "split.count" in reader.fields:
        fault = f"{path} is one of several files, or has the bytes of numbers in another order"
        raise AptError(fault, "merge it, or convert it, with llama.cpp's tools", ("source",))
    return reader


def _text(reader: gguf.GGUFReader, key: str) -> str:
    field = reader.fields.get(key)
    return str(field.contents()) if field is not None else "none"


def _other(model: Exportable, reason: str) -> AptError:
    fault = f"{model.name} was not made from {model.original}: {reason}"
    return AptError(fault, "name the right file", ("source",))


def _changes(model: Exportable, reader: gguf.GGUFReader, architecture: str) -> dict[str, Any]:
    """The entries for which the configuration has another value, and those that are new."""
    known = {key: field.contents() for key, field in _sizes(reader, architecture).items()}
    tokens = known.get(f"{architecture}.vocab_size", _count(reader, "tokenizer.ggml.tokens"))
    if tokens != model.config.vocab_size:
        raise _other(model, f"it has {tokens:,} tokens, not {model.config.vocab_size:,}")
    fields: Mapping[str, str | None] = GGUF_CONFIG_MAPPING[architecture]
    changes = dict[str, Any]()
    for entry, name in fields.items():
        key = f"{architecture}.{entry}"
        value = getattr(model.config, name, None) if name else None
        if value is None or key not in known or _same(known[key], value):
            continue
        if isinstance(known[key], list):
            fault = f"{model.original} has a {key} for each block, and {model.name} has another"
            raise AptError(fault, "a model with such an entry keeps its blocks and sizes")
        changes[key] = value
    if f"{architecture}.block_count" in changes and architecture in _IN_TURN:
        fault = f"{model.name} lacks blocks, and the blocks of its family are of several kinds"
        raise AptError(fault, "GGUF derives the kinds from their positions: keep all blocks")
    return changes | _head_sizes(model.config, architecture, reader)


def _sizes(reader: gguf.GGUFReader, architecture: str) -> dict[str, gguf.ReaderField]:
    """The entries of an architecture."""
    prefix = f"{architecture}."
    return {key: field for key, field in reader.fields.items() if key.startswith(prefix)}


def _count(reader: gguf.GGUFReader, key: str) -> int:
    """The length of a list."""
    return len(reader.fields[key].data) if key in reader.fields else 0


def _same(before: Any, after: Any) -> bool:
    """True if two values are the same, as fp32 if they are numbers with a point."""
    if isinstance(before, float) and isinstance(after, float):
        return bool(np.float32(before) == np.float32(after))
    return bool(before == after)


def _head_sizes(config: Any, architecture: str, reader: gguf.GGUFReader) -> dict[str, int]:
    """The sizes of keys and values, where llama.cpp would not find them by division.

    It divides the hidden size by the number of heads, which is wrong once heads are missing.
    transformers reads the size from ``rope.dimension_count`` in some architectures.
    """
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        return {}
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if size * heads == config.hidden_size:
        return {}
    entries = ["attention.key_length", "attention.value_length"]
    if GGUF_CONFIG_MAPPING[architecture].get("rope.dimension_count") == "head_dim":
        entries.append("rope.dimension_count")
    return {
        key: size for key in (f"{architecture}.{entry}" for entry in entries)
        if key not in reader.fields
    }  # fmt: skip


def _copy(reader: gguf.GGUFReader, writer: gguf.GGUFWriter, changes: Mapping[str, Any]) -> None:
    """Copy all entries of a file but those that differ, in their order; new ones come last."""
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == _ARCHITECTURE:
            continue
        kind, *inside = field.types
        value = changes[key] if key in changes else field.contents()
        if kind is Kind.ARRAY and not value:
            continue  # the package writes none, and llama.cpp takes an absent list as an empty one
        writer.add_key_value(key, value, kind, inside[-1] if inside else None)
    for key in changes.keys() - reader.fields.keys():
        writer.add_uint32(key, changes[key])


def _tensors(
    model: Exportable, reader: gguf.GGUFReader, architecture: str, kind: Type
) -> Iterator[Planned]:
    """The tensors in the order of the original; those that the model does not have are copied.

    Raises:
        AptError: a tensor of a block is not in the model, or a parameter is not in the original.
    """
    blocks = len(model.blocks)
    names = tensor_names(model, architecture)
    left = dict(names)
    for tensor in reader.tensors:
        block = _BLOCK.match(tensor.name)
        if block is not None and int(block[1]) >= blocks:
            continue
        if (name := left.pop(tensor.name, None)) is not None:
            yield planned_of(model, tensor.name, name, architecture, kind)
        elif block is None:
            yield _copied(tensor)
        else:
            raise _other(model, f"{tensor.name} belongs to no parameter of the model")
    for tensor_name, name in left.items():
        raise _other(model, f"it has no {tensor_name} for {name}")


def _copied(tensor: gguf.ReaderTensor) -> Planned:
    shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
    return Planned(tensor.name, shape, tensor.tensor_type, lambda: tensor.data, raw=True)
