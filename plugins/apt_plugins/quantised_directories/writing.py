"""Smaller safetensors files: tensors of ranges of the bytes of other files, and new ones."""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from apt.checkpoints.safetensors_io import Entry, Shards, read_metadata, synchronise, write_header
from apt.errors import AptError
from apt.files.index import write_index

_CHUNK = 2**24  # bytes that are copied at once
_INDEX = "model.safetensors.index.json"

Content = Sequence[range | Tensor]
"""The bytes of a tensor: ranges of a file, and new values, one after the other."""


@dataclass(frozen=True)
class Sliced:
    """A tensor to write.

    Attributes:
        source: the tensor that it is made of: it lies in the file of the same name, in this order.
        content: its bytes, as ranges of the file of ``source`` and new values.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: Entry
    content: Content

    @property
    def size(self) -> int:
        """The number of bytes."""
        return sum(
            len(part) if isinstance(part, range) else part.numel() * part.itemsize
            for part in self.content
        )


def whole(key: str, entry: Entry) -> Sliced:
    """A copy of a tensor."""
    content = [range(entry.start, entry.start + entry.size)]
    return Sliced(key, entry.dtype, entry.shape, entry, content)


def new_values(key: str, entry: Entry, values: Tensor) -> Sliced:
    """New values in the place of a tensor."""
    return Sliced(key, values.dtype, tuple(values.shape), entry, [values])


def some_rows(key: str, entry: Entry, rows: Iterable[int]) -> Sliced:
    """Some slices of the first dimension of a tensor."""
    ranges = [row_of(entry, row) for row in rows]
    return Sliced(key, entry.dtype, (len(ranges), *entry.shape[1:]), entry, ranges)


def row_of(entry: Entry, row: int) -> range:
    """The bytes of one slice of the first dimension."""
    if not 0 <= row < entry.shape[0]:
        raise ValueError(f"row {row} of {entry.shape}")
    size = entry.size // entry.shape[0]
    start = entry.start + row * size
    return range(start, start + size)


def write_shards(tensors: Iterable[Sliced], shards: Shards, target: Path, parameters: int) -> None:
    """Write tensors to files of the same names as those that they come from, and their index.

    A file that would have no tensors is not written.

    Args:
        tensors: the tensors.
        shards: the files that they come from.
        target: an existing directory.
        parameters: the number of weights, for the index.
    """
    ordered = sorted(tensors, key=lambda each: (each.source.file, each.source.start))
    file_of: dict[str, str] = {}
    for file, group in groupby(ordered, key=lambda each: each.source.file):
        _write_file(list(group), file, target / file.name)
    for each in ordered:
        file_of[each.key] = each.source.file.name
    index = shards.files[0].with_name(_INDEX)
    if shards.files[0].name != "model.safetensors" and index.is_file():
        about: dict[str, Any] = {**shards.about, "total_size": sum(each.size for each in ordered)}
        if "total_parameters" in about:
            about["total_parameters"] = parameters
        write_index(target / _INDEX, about, file_of)
        synchronise(target / _INDEX)


def _write_file(tensors: Sequence[Sliced], source: Path, target: Path) -> None:
    header = write_header(
        ((each.key, each.dtype, each.shape) for each in tensors), read_metadata(source)
    )
    with source.open("rb") as old, target.open("xb") as new:
        new.write(header)
        for each in tensors:
            for part in _joined(each.content):
                if isinstance(part, range):
                    _copy(old, part, new, each.key)
                else:
                    values: Any = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                    new.write(values.numpy())
    synchronise(target)


def _joined(content: Content) -> Iterator[range | Tensor]:
    """The same bytes in fewer ranges."""
    last: range | None = None
    for part in content:
        if isinstance(part, range) and last is not None and last.stop == part.start:
            last = range(last.start, part.stop)
            continue
        if last is not None:
            yield last
        last = part if isinstance(part, range) else None
        if isinstance(part, Tensor):
            yield part
    if last is not None:
        yield last


def _copy(old: IO[bytes], part: range, new: IO[bytes], key: str) -> None:
    old.seek(part.start)
    left = len(part)
    while left:
        data = old.read(min(left, _CHUNK))
        if not data:
            raise AptError(f"{old.name} ends within {key}", "is it complete?")
        new.write(data)
        left -= len(data)


def remove_partial(target: Path) -> None:
    """Delete a directory that was not written to its end."""
    shutil.rmtree(target, ignore_errors=True)
