"""The header of a GGUF file: its entries and the list of its tensors, each with its stored bytes.

The reader of the package gguf makes several arrays of each token, which takes seconds and hundreds
of megabytes for the vocabulary of a large model. Here lists of strings are skipped, not read.
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
_MOST_DIMENSIONS = 8


@dataclass(frozen=True)
class Entry:
    """An entry of the metadata.

    Attributes:
        kind: the kind of the value.
        inside: the kind of the items of a list; None for other values.
        value: the value; for a list of strings the number of its items.
        stored: the bytes of the entry, with its key.
    """

    kind: Kind
    inside: Kind | None
    value: Any
    stored: bytes


@dataclass(frozen=True)
class Place:
    """A tensor in a file.

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
        alignment: the number of bytes of which all positions of tensors are multiples.
        entries: the entries by key, in the order of the file.
        tensors: the tensors by name, in the order of the file.
    """

    version: int
    alignment: int
    entries: Mapping[str, Entry]
    tensors: Mapping[str, Place]


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
        magic, version, tensors, entries = self._numbers("IIQQ")
        if magic != gguf.GGUF_MAGIC:
            raise ValueError("it does not begin with GGUF")
        if version & 0xFFFF == 0:
            return None
        if version not in _VERSIONS:
            raise ValueError(f"its version is {version}")
        found = dict[str, Entry]()
        for _ in range(entries):
            key, entry = self._entry()
            if key in found:
                raise ValueError(f"it has {key} twice")
            found[key] = entry
        alignment = found[_ALIGNMENT].value if _ALIGNMENT in found else gguf.GGUF_DEFAULT_ALIGNMENT
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {alignment}")
        return Header(version, alignment, found, self._tensors(tensors, alignment))

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
        kind, inside = Kind(self._numbers("I")[0]), None
        if kind is Kind.ARRAY:
            inside, value = self._list()
        elif kind is Kind.STRING:
            value = self._string()
        else:
            (value,) = self._numbers(SCALARS[kind])
        return key, Entry(kind, inside, value, self._data[start : self._position])

    def _list(self) -> tuple[Kind, Any]:
        number, count = self._numbers("IQ")
        inside = Kind(number)
        if inside is Kind.STRING:
            for _ in range(count):
                self._skip(self._numbers("Q")[0])
            return inside, count
        if count > len(self._data):
            raise ValueError("it ends too early")
        return inside, list(self._numbers(f"{count}{SCALARS[inside]}"))

    def _tensors(self, count: int, alignment: int) -> dict[str, Place]:
        given = dict[str, tuple[Type, tuple[int, ...], int]]()
        for _ in range(count):
            name, (dimensions,) = self._string(), self._numbers("I")
            if not 0 < dimensions <= _MOST_DIMENSIONS or name in given:
                raise ValueError(f"its tensor {name} has {dimensions} dimensions, or comes twice")
            shape = self._numbers(f"{dimensions}Q")[::-1]
            kind, offset = self._numbers("IQ")
            given[name] = Type(kind), shape, offset
        begin = self._position + -self._position % alignment
        return {
            name: self._place(name, kind, shape, begin + offset)
            for name, (kind, shape, offset) in given.items()
        }

    def _place(self, name: str, kind: Type, shape: tuple[int, ...], start: int) -> Place:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block or not all(shape):
            raise ValueError(f"{name} has rows of {shape[-1]} numbers of type {kind.name}")
        place = Place(kind, shape, start, prod(shape) // block * size)
        if start + place.size > len(self._data):
            raise ValueError(f"it ends within {name}")
        return place
