"""The plan of a GGUF file for a model that was made from a GGUF file, the original.

The metadata, the tokenizer and the order of the tensors are copied from the original. An entry is
changed if the configuration of the model has another value. transformers has the mapping from
fields of the configuration to entries.
"""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Kind
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from apt.errors import AptError, describe
from apt.extending import Exportable
from apt_plugins.gguf_files.layouts import architecture_of
from apt_plugins.gguf_files.tensors import (
    PLAIN_TYPES,
    can_write,
    file_type,
    has_partial_blocks,
    most_common_type,
    plain_type,
    planned_of,
    tensor_names,
)
from apt_plugins.gguf_files.writing import Planned

_BLOCK = re.compile(r"blk\.(\d+)\.")
_ARCHITECTURE, _FILE_TYPE = "general.architecture", "general.file_type"
_SIZE_LABEL = "general.size_label"
_ALTERNATING = ("gemma2", "gemma3")  # every second or sixth block has no window


def from_original(
    model: Exportable, target: Path, kind: Type | None
) -> tuple[gguf.GGUFWriter, list[Planned]]:
    """A writer with the metadata of the original, and the tensors to write.

    Args:
        kind: the type of the weights; None for the type of each tensor in the original.

    Raises:
        AptError: the original is damaged or belongs to another model, or the format cannot express
            the model.
    """
    assert model.original is not None
    reader = _read(model.original)
    architecture = architecture_of(model)
    if (stored_name := _text(reader, _ARCHITECTURE)) != architecture:
        raise _wrong_original(model, f"its architecture is {stored_name}, not {architecture}")
    changes = _changes(model, reader, architecture)
    tensors = list(_tensors(model, reader, architecture, kind))
    if kind is not None or model.is_fitted:
        changes[_FILE_TYPE] = int(file_type(kind or most_common_type(tensors)))
    before = sum(int(tensor.n_elements) for tensor in reader.tensors)
    after = sum(int(np.prod(planned.shape)) for planned in tensors)
    if after != before and _SIZE_LABEL in reader.fields:
        changes[_SIZE_LABEL] = gguf.size_label(after, after, 0, 0)
    writer = gguf.GGUFWriter(target, architecture)
    writer.data_alignment = int(reader.alignment)
    _copy_entries(reader, writer, changes)
    return writer, tensors


def _read(path: Path) -> gguf.GGUFReader:
    try:
        reader = _reader(path, path.stat().st_mtime_ns)
    except (ValueError, KeyError, IndexError, OSError, OverflowError) as error:
        message = f"{path} is not a GGUF file, or is damaged: {describe(error)}"
        raise AptError(message, "get it again", ("source",)) from error
    if reader.endianess is not gguf.GGUFEndian.LITTLE or "split.count" in reader.fields:
        message = f"{path} is one of several files, or has the bytes of numbers in another order"
        raise AptError(message, "merge it, or convert it, with llama.cpp's tools", ("source",))
    return reader


@lru_cache(maxsize=1)  # a fit lays out files of several smaller models
def _reader(path: Path, changed: int) -> gguf.GGUFReader:
    """The reader of a file, which was last changed at this time."""
    return gguf.GGUFReader(str(path))


def _text(reader: gguf.GGUFReader, key: str) -> str:
    field = reader.fields.get(key)
    return str(field.contents()) if field is not None else "none"


def _wrong_original(model: Exportable, reason: str) -> AptError:
    message = f"{model.name} was not made from {model.original}: {reason}"
    return AptError(message, "name the right file", ("source",))


def _changes(model: Exportable, reader: gguf.GGUFReader, architecture: str) -> dict[str, Any]:
    """The entries that the configuration changes or adds, with their new values."""
    stored = {key: field.contents() for key, field in _fields_of(reader, architecture).items()}
    tokens = stored.get(f"{architecture}.vocab_size", _list_length(reader, "tokenizer.ggml.tokens"))
    if tokens != model.config.vocab_size:
        raise _wrong_original(model, f"it has {tokens:,} tokens, not {model.config.vocab_size:,}")
    fields: Mapping[str, str | None] = GGUF_CONFIG_MAPPING[architecture]
    changes = dict[str, Any]()
    for entry, name in fields.items():
        key = f"{architecture}.{entry}"
        value = getattr(model.config, name, None) if name else None
        if value is None or key not in stored or _equal_values(stored[key], value):
            continue
        if isinstance(stored[key], list):
            message = f"{model.original} has a {key} for each block, and {model.name} has another"
            raise AptError(message, "a model with such an entry keeps its blocks and sizes")
        changes[key] = value
    if f"{architecture}.block_count" in changes and architecture in _ALTERNATING:
        message = f"{model.name} lacks blocks, and the blocks of its family are of several kinds"
        raise AptError(message, "GGUF derives the kinds from their positions: keep all blocks")
    return changes | _head_sizes(model.config, architecture, reader)


def _fields_of(reader: gguf.GGUFReader, architecture: str) -> dict[str, gguf.ReaderField]:
    """The entries whose keys begin with the name of an architecture."""
    prefix = f"{architecture}."
    return {key: field for key, field in reader.fields.items() if key.startswith(prefix)}


def _list_length(reader: gguf.GGUFReader, key: str) -> int:
    """The length of an entry that is a list; 0 without the entry."""
    return len(reader.fields[key].data) if key in reader.fields else 0


def _equal_values(before: Any, after: Any) -> bool:
    """True if two values are the same; floating-point numbers are compared in fp32."""
    if isinstance(before, float) and isinstance(after, float):
        return bool(np.float32(before) == np.float32(after))
    return bool(before == after)


def _head_sizes(config: Any, architecture: str, reader: gguf.GGUFReader) -> dict[str, int]:
    """The new entries for the sizes of keys and values, where llama.cpp's default is wrong.

    Its default is the hidden size divided by the number of heads, which is wrong after the removal
    of heads. In some architectures, transformers reads the size from ``rope.dimension_count``.
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


def _copy_entries(
    reader: gguf.GGUFReader, writer: gguf.GGUFWriter, changes: Mapping[str, Any]
) -> None:
    """Copy all entries of a file in their order, with the changed values; new entries come last."""
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == _ARCHITECTURE:
            continue
        kind, *item_types = field.types
        value = changes[key] if key in changes else field.contents()
        if kind is Kind.ARRAY and not value:
            continue  # the package writes no empty list, and llama.cpp reads none as an empty one
        writer.add_key_value(key, value, kind, item_types[-1] if item_types else None)
    for key in changes.keys() - reader.fields.keys():
        writer.add_uint32(key, changes[key])


def _tensors(
    model: Exportable, reader: gguf.GGUFReader, architecture: str, kind: Type | None
) -> Iterator[Planned]:
    """The tensors in the order of the original; tensors that the model does not have are copied.

    Raises:
        AptError: a tensor of a block is not in the model, or a parameter is not in the original.
    """
    blocks = len(model.blocks)
    names = tensor_names(model, architecture)
    remaining = dict(names)
    for tensor in reader.tensors:
        block = _BLOCK.match(tensor.name)
        if block is not None and int(block[1]) >= blocks:
            continue
        if (name := remaining.pop(tensor.name, None)) is not None:
            yield _planned_tensor(model, tensor, name, architecture, kind)
        elif block is None:
            yield _copied_tensor(tensor)
        else:
            raise _wrong_original(model, f"{tensor.name} belongs to no parameter of the model")
    for tensor_name, name in remaining.items():
        raise _wrong_original(model, f"it has no {tensor_name} for {name}")


def _planned_tensor(
    model: Exportable, tensor: gguf.ReaderTensor, name: str, architecture: str, kind: Type | None
) -> Planned:
    """The tensor to write for a parameter, in the type of the file or in its own type.

    Only a quantised tensor keeps its own type: other tensors have the dtype of the model.
    """
    own_type = tensor.tensor_type
    if kind is not None or own_type in PLAIN_TYPES:
        return planned_of(model, tensor.name, name, architecture, kind or plain_type(model))
    if not can_write(own_type) or has_partial_blocks(model.shapes[name], own_type):
        return planned_of(model, tensor.name, name, architecture, Type.F16)
    return planned_of(model, tensor.name, name, architecture, own_type, lambda: tensor.data)


def _copied_tensor(tensor: gguf.ReaderTensor) -> Planned:
    shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
    return Planned(tensor.name, shape, tensor.tensor_type, lambda: tensor.data, raw=True)
