"""The safetensors files of a checkpoint, read and written tensor by tensor.

A tensor is written over its own bytes: layout, dtypes and metadata of a copied checkpoint stay as
they were. Files come from strangers, so nothing in them is believed before it is checked.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt.errors import AptError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_LARGEST_HEADER = 100_000_000  # bytes, as safetensors itself has it
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: ``size`` bytes of ``file`` from ``start`` on."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class Shards:
    """The tensors of a directory.

    Args:
        directory: a directory with ``model.safetensors``, or with several files and their index.

    Raises:
        AptError: there is neither, or a file is not what it should be.
    """

    def __init__(self, directory: Path) -> None:
        self.entries: dict[str, Entry] = {}
        for path in _files(directory):
            for name, entry in read_header(path).items():
                if name in self.entries:
                    raise AptError(
                        f"{name} is in {self.entries[name].file.name} and in {path.name}"
                    )
                self.entries[name] = entry

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""
        entry = self.entries[name]
        raw = torch.empty(entry.size, dtype=torch.uint8)
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.start)
            view, done = _bytes(raw), 0
            while done < entry.size:
                count = file.readinto(view[done:])
                if not count:
                    raise AptError(f"{entry.file} ends within {name}", "is it complete?")
                done += count
        return raw.view(entry.dtype).view(entry.shape)

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write tensors over their own bytes, and wait until the disk has them."""
        files: dict[Path, int] = {}
        try:
            for name, tensor in tensors:
                entry = self.entries[name]
                if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                    raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}")
                if entry.file not in files:
                    files[entry.file] = os.open(entry.file, os.O_WRONLY)
                raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
                view, done = _bytes(raw), 0
                while done < entry.size:
                    done += os.pwrite(files[entry.file], view[done:], entry.start + done)
            for file in files.values():
                os.fsync(file)
        finally:
            for file in files.values():
                os.close(file)


def _bytes(raw: Tensor) -> memoryview:
    """The memory of a tensor of bytes."""
    array: Any = raw.numpy()
    return memoryview(array)


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if not index.is_file():
        if not (directory / SINGLE).is_file():
            raise AptError(f"{directory} has no {SINGLE}", "only safetensors can be streamed")
        return [directory / SINGLE]
    names = sorted(set(_read_index(index).values()))
    for name in names:
        if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name:
            raise AptError(f"{index} names a file outside its directory: {name!r}", "do not use it")
        if not (directory / name).is_file():
            raise AptError(f"{directory} lacks {name}", "is the checkpoint complete?")
    return [directory / name for name in names]


def _read_index(path: Path) -> dict[str, str]:
    """From tensor to file."""
    try:
        found: Any = json.loads(path.read_bytes())
        weights = found["weight_map"]
        if not weights or not all(isinstance(v, str) for v in weights.values()):
            raise ValueError("no map of weights")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AptError(f"{path} is damaged: {error}", "get the checkpoint again") from error
    return dict(weights)


def read_header(path: Path) -> dict[str, Entry]:
    """What tensors a safetensors file holds.

    Raises:
        AptError: its header is not one, or points outside of the file.
    """
    length = path.stat().st_size
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if length < 8 or size > min(_LARGEST_HEADER, length - 8):
            raise _damaged(path, f"its header would have {size:,} of {length:,} bytes")
        raw = file.read(size)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        return {name: _entry(path, item, 8 + size, length) for name, item in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _entry(path: Path, item: Any, base: int, length: int) -> Entry:
    dtype, shape = _DTYPES[item["dtype"]], tuple(item["shape"])
    begin, end = item["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError("sizes and places must be whole numbers from 0 up")
    size = math.prod(shape) * dtype.itemsize
    if end - begin != size or base + end > length:
        raise ValueError(f"{shape} in bytes {begin:,} to {end:,} of {length - base:,}")
    return Entry(path, dtype, shape, base + begin, size)


def _damaged(path: Path, how: str) -> AptError:
    return AptError(f"{path} is damaged: {how}", "get the checkpoint again")
