"""The header of a GGUF file: its entries and the list of its tensors, each with its stored bytes.

The reader of the package gguf makes several arrays of each token, which takes seconds and hundreds
of megabytes for the vocabulary of a large model. This module skips lists of strings.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Kind

from apt.errors import AptError, describe

SCALARS: Mapping[Kind, str] = {
    Kind.UINT8: "B", Kind.INT8: "b", Kind.UINT16: "H", Kind.INT16: "h", Kind.UINT32: "I",
    Kind.INT32: "i", Kind.FLOAT32: "f", Kind.BOOL: "?", Kind.UINT64: "Q", Kind.INT64: "q",
    Kind.FLOAT64: "d",
}  # fmt: skip
"""The codes of the module struct for kinds of numbers."""

_ALIGNMENT, _SPLIT = "general.alignment", "split.count"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class Entry:
    """An entry of the metadata.

    Attributes:
        kind: the kind of the value.
        item_kind: the kind of the items of a list; None for other values.
        value: the value; for a list of strings the number of its items.
        raw: the bytes of the entry in the file, with its key.
    """

    kind: Kind
    item_kind: Kind | None
    value: Any
    raw: bytes


@dataclass(frozen=True)
class TensorLocation:
    """The type, the shape and the bytes of a tensor in a file.

    Attributes:
        kind: the type of its numbers.
        shape: the shape, with the columns last, as in numpy and torch.
        start: the position of its bytes in the file.
        size: the number of its bytes.
    """

    kind: Type
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """The header of a file.

    Attributes:
        version: the version of the format.
        alignment: the positions of tensors are multiples of this number of bytes.
        entries: the entries by key, in the order of the file.
        tensors: the tensors by name, in the order of the file.
    """

    version: int
    alignment: int
    entries: Mapping[str, Entry]
    tensors: Mapping[str, TensorLocation]


def read_header(path: Path) -> Header:
    """Read the header of a file.

    Raises:
        AptError: the file is damaged, is a part of a split file, or has big-endian numbers.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Cursor(data).header()
    except (ValueError, KeyError, struct.error, OSError, OverflowError) as error:
        ends_early = isinstance(error, struct.error)
        problem = "it ends within its header" if ends_early else describe(error)
        message = f"{path} is not a GGUF file, or is damaged: {problem}"
        raise AptError(message, "get the file again") from error
    if header is None or _SPLIT in header.entries:
        message = f"{path} is one of several files, or has the bytes of numbers in another order"
        raise AptError(message, "merge it, or convert it, with llama.cpp's tools")
    return header


class _Cursor:
    """A position in the bytes of a file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._position = data, 0

    def header(self) -> Header | None:
        """The header; None if the numbers are big-endian."""
        magic, version, tensor_count, entry_count = self._numbers("IIQQ")
        if magic != gguf.GGUF_MAGIC:
            raise ValueError("it does not begin with GGUF")
        if version & 0xFFFF == 0:
            return None
        if version not in _VERSIONS:
            raise ValueError(f"its version is {version}")
        entries = dict[str, Entry]()
        for _ in range(entry_count):
            key, entry = self._entry()
            if key in entries:
                raise ValueError(f"it has {key} twice")
            entries[key] = entry
        alignment = (
            entries[_ALIGNMENT].value if _ALIGNMENT in entries else gguf.GGUF_DEFAULT_ALIGNMENT
        )
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {alignment}")
        return Header(version, alignment, entries, self._tensors(tensor_count, alignment))

    def _numbers(self, codes: str) -> tuple[Any, ...]:
        numbers = struct.unpack_from(f"<{codes}", self._data, self._position)
        self._position += struct.calcsize(f"<{codes}")
        return numbers

    def _bytes(self, size: int) -> bytes:
        self._skip(size)
        return self._data[self._position - size : self._position]

    def _skip(self, size: int) -> None:
        self._position += size
        if self._position > len(self._data):
            raise ValueError("it ends too early")

    def _string(self) -> str:
        (size,) = self._numbers("Q")
        return self._bytes(size).decode()

    def _entry(self) -> tuple[str, Entry]:
        start, key = self._position, self._string()
        kind, item_kind = Kind(self._numbers("I")[0]), None
        if kind is Kind.ARRAY:
            item_kind, value = self._list()
        elif kind is Kind.STRING:
            value = self._string()
        else:
            (value,) = self._numbers(SCALARS[kind])
        return key, Entry(kind, item_kind, value, self._data[start : self._position])

    def _list(self) -> tuple[Kind, Any]:
        kind_number, count = self._numbers("IQ")
        item_kind = Kind(kind_number)
        if item_kind is Kind.STRING:
            for _ in range(count):
                self._skip(self._numbers("Q")[0])
            return item_kind, count
        if count > len(self._data):
            raise ValueError("it ends too early")
        return item_kind, list(self._numbers(f"{count}{SCALARS[item_kind]}"))

    def _tensors(self, count: int, alignment: int) -> dict[str, TensorLocation]:
        descriptions = dict[str, tuple[Type, tuple[int, ...], int]]()
        for _ in range(count):
            name, (dimensions,) = self._string(), self._numbers("I")
            if not 0 < dimensions <= _MAX_DIMENSIONS or name in descriptions:
                raise ValueError(f"its tensor {name} has {dimensions} dimensions, or comes twice")
            shape = self._numbers(f"{dimensions}Q")[::-1]
            kind, offset = self._numbers("IQ")
            descriptions[name] = Type(kind), shape, offset
        data_start = self._position + -self._position % alignment
        return {
            name: self._location(name, kind, shape, data_start + offset)
            for name, (kind, shape, offset) in descriptions.items()
        }

    def _location(
        self, name: str, kind: Type, shape: tuple[int, ...], start: int
    ) -> TensorLocation:
        block_numbers, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block_numbers or not all(shape):
            raise ValueError(f"{name} has rows of {shape[-1]} numbers of type {kind.name}")
        location = TensorLocation(kind, shape, start, prod(shape) // block_numbers * block_bytes)
        if start + location.size > len(self._data):
            raise ValueError(f"it ends within {name}")
        return location
