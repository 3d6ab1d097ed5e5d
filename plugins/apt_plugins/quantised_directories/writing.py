"""Writing of smaller safetensors files, from ranges of the bytes of larger files and new values."""

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
class NewTensor:
    """A tensor to write.

    Attributes:
        key: the name in the smaller model.
        dtype: the stored dtype.
        shape: the stored shape.
        source: the original tensor. The new tensor is written to a file of the same name, and the
            tensors of a file keep the order of their sources.
        content: the bytes, as ranges of the file of ``source`` and new values.
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


def copied(key: str, entry: Entry) -> NewTensor:
    """A copy of a tensor."""
    content = [range(entry.start, entry.start + entry.size)]
    return NewTensor(key, entry.dtype, entry.shape, entry, content)


def replaced(key: str, entry: Entry, values: Tensor) -> NewTensor:
    """New values in the place of a tensor."""
    return NewTensor(key, values.dtype, tuple(values.shape), entry, [values])


def copied_rows(key: str, entry: Entry, rows: Iterable[int]) -> NewTensor:
    """Some slices of the first dimension of a tensor."""
    ranges = [row_range(entry, row) for row in rows]
    return NewTensor(key, entry.dtype, (len(ranges), *entry.shape[1:]), entry, ranges)


def row_range(entry: Entry, row: int) -> range:
    """The bytes of one slice of the first dimension."""
    if not 0 <= row < entry.shape[0]:
        raise ValueError(f"row {row} of {entry.shape}")
    size = entry.size // entry.shape[0]
    start = entry.start + row * size
    return range(start, start + size)


def write_shards(
    tensors: Iterable[NewTensor], shards: Shards, target: Path, parameters: int
) -> None:
    """Write tensors, each to a file of the same name as its source's file, and the index.

    A file that would have no tensors is not written.

    Args:
        tensors: the tensors.
        shards: the files that they come from.
        target: an existing directory.
        parameters: the number of weights, for the index.
    """
    ordered = sorted(tensors, key=lambda tensor: (tensor.source.file, tensor.source.start))
    file_of: dict[str, str] = {}
    for file, group in groupby(ordered, key=lambda tensor: tensor.source.file):
        _write_file(list(group), file, target / file.name)
    for tensor in ordered:
        file_of[tensor.key] = tensor.source.file.name
    index = shards.files[0].with_name(_INDEX)
    if shards.files[0].name != "model.safetensors" and index.is_file():
        total_size = sum(tensor.size for tensor in ordered)
        metadata: dict[str, Any] = {**shards.about, "total_size": total_size}
        if "total_parameters" in metadata:
            metadata["total_parameters"] = parameters
        write_index(target / _INDEX, metadata, file_of)
        synchronise(target / _INDEX)


def _write_file(tensors: Sequence[NewTensor], source: Path, target: Path) -> None:
    header = write_header(
        ((tensor.key, tensor.dtype, tensor.shape) for tensor in tensors), read_metadata(source)
    )
    with source.open("rb") as source_file, target.open("xb") as target_file:
        target_file.write(header)
        for tensor in tensors:
            for part in _joined(tensor.content):
                if isinstance(part, range):
                    _copy(source_file, part, target_file, tensor.key)
                else:
                    values: Any = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                    target_file.write(values.numpy())
    synchronise(target)


def _joined(content: Content) -> Iterator[range | Tensor]:
    """The same content; ranges that follow each other in the file are joined."""
    pending: range | None = None
    for part in content:
        if isinstance(part, range) and pending is not None and pending.stop == part.start:
            pending = range(pending.start, part.stop)
            continue
        if pending is not None:
            yield pending
        pending = part if isinstance(part, range) else None
        if isinstance(part, Tensor):
            yield part
    if pending is not None:
        yield pending


def _copy(source: IO[bytes], part: range, target: IO[bytes], key: str) -> None:
    source.seek(part.start)
    remaining = len(part)
    while remaining:
        data = source.read(min(remaining, _CHUNK))
        if not data:
            raise AptError(f"{source.name} ends within {key}", "is it complete?")
        target.write(data)
        remaining -= len(data)


def remove_partial(target: Path) -> None:
    """Delete a directory after an error or an interruption of its writing."""
    shutil.rmtree(target, ignore_errors=True)
