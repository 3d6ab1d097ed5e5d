"""The safetensors files of a checkpoint, read and written tensor by tensor.

A tensor is written over its own bytes: layout, dtypes and metadata of a copied checkpoint do not
change. Files may come from untrusted sources, so their content is checked before use.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from apt.errors import AptError, NotStoredError
from apt.files.index import index_metadata, indexed_files, write_index

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_PICKLED_INDEX = "pytorch_model.bin.index.json"
_POINTER = b"version https://git-lfs"
_LARGEST_HEADER = 100_000_000  # bytes, the limit of safetensors itself
_AT_ONCE = 2**22  # values
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
_DTYPES_FP8 = {
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"
}  # fmt: skip
"""The floating-point dtypes of 8 bits, which quantised checkpoints have."""

_DTYPES |= {n: dtype for n, t in _DTYPES_FP8.items() if (dtype := getattr(torch, t, None))}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """The place of a tensor on disk: ``size`` bytes of ``file`` from ``start`` on."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class Shards:
    """The tensors of a directory.

    Args:
        directory: a directory with a single file, or with several files and their index.
        single, index: the names of the single file and of the index.
        fp8: True if tensors may have floating-point numbers of 8 bits.

    Raises:
        AptError: there is no single file and no index, or a file is damaged.

    Attributes:
        entries: the place of each tensor on disk.
        files: the files, sorted.
        about: the metadata of the index; empty without an index.
    """

    def __init__(
        self, directory: Path, single: str = SINGLE, index: str = INDEX, *, fp8: bool = False
    ) -> None:
        self.entries: dict[str, Entry] = {}
        self.files, self.about = _files(directory, single, index)
        for path in self.files:
            for name, entry in read_header(path, fp8=fp8).items():
                if name in self.entries:
                    raise AptError(
                        f"{name} is in {self.entries[name].file.name} and in {path.name}"
                    )
                self.entries[name] = entry

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def read(self, name: str) -> Tensor:
        """Read a tensor into new memory."""
        entry = self.entries[name]
        return self._read(name, 0, entry.size).view(entry.dtype).view(entry.shape)

    def read_slice(self, name: str, index: int) -> Tensor:
        """Read one slice of the first dimension of a tensor into new memory."""
        entry = self.entries[name]
        size = entry.size // entry.shape[0]
        raw = self._read(name, index * size, size)
        return raw.view(entry.dtype).view(entry.shape[1:])

    def _read(self, name: str, start: int, size: int) -> Tensor:
        """Some bytes of a tensor."""
        entry = self.entries[name]
        raw = torch.empty(size, dtype=torch.uint8)
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.start + start)
            view, position = _bytes(raw), 0
            while position < size:
                count = file.readinto(view[position:])
                if not count:
                    raise AptError(f"{entry.file} ends within {name}", "is it complete?")
                position += count
        return raw

    def read_finite(self, name: str) -> Tensor:
        """Read a tensor, and raise if a value is not finite."""
        tensor = self.read(name)
        parts = torch.split(
            tensor.reshape(-1), _AT_ONCE
        )  # `isfinite` needs a copy of what it checks
        if not all(torch.isfinite(part).all() for part in parts):
            message = f"{name} in {self.entries[name].file} holds values that are not finite"
            raise AptError(message, "the checkpoint is damaged; get it again")
        return tensor

    def digest(self, names: Iterable[str]) -> str:
        """A checksum of tensors as stored on disk."""
        hasher = hashlib.blake2b(digest_size=16)
        for name in names:
            raw = self.read(name).reshape(-1).view(torch.uint8)
            hasher.update(f"{name}\n".encode())
            hasher.update(_bytes(raw))
        return hasher.hexdigest()

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write tensors over their own bytes, in their dtypes; raises `OSError` for a link."""
        descriptors: dict[Path, int] = {}
        try:
            for name, tensor in tensors:
                entry = self.entries[name]
                if tuple(tensor.shape) != entry.shape:
                    raise ValueError(f"{name} is {tuple(tensor.shape)}, not {entry.shape}")
                if entry.file not in descriptors:
                    descriptors[entry.file] = os.open(entry.file, os.O_WRONLY | os.O_NOFOLLOW)
                stored = tensor.detach().cpu().to(entry.dtype).contiguous()
                raw = stored.view(-1).view(torch.uint8)
                view, position = _bytes(raw), 0
                while position < entry.size:
                    position += os.pwrite(
                        descriptors[entry.file], view[position:], entry.start + position
                    )
            for descriptor in descriptors.values():
                os.fsync(descriptor)
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)


def write_files(
    directory: Path,
    parts: Iterable[tuple[dict[str, Tensor], dict[str, str] | None]],
    count: int,
    stem: str = "model",
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint of ``count`` files, with an index if there are several.

    Args:
        parts: the tensors and the metadata of each file.
        stem: the beginning of the names of the files.
        about: the metadata of the index, without the total size of the tensors.
    """
    file_of, size = dict[str, str](), 0
    for number, (tensors, metadata) in enumerate(parts, 1):
        suffix = f"-{number:05d}-of-{count:05d}" if count > 1 else ""
        name = f"{stem}{suffix}.safetensors"
        save_file(tensors, directory / name, metadata)
        synchronise(directory / name)
        file_of |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if count > 1:
        index = directory / f"{stem}.safetensors.index.json"
        write_index(index, {**(about or {}), "total_size": size}, file_of)


def synchronise(path: Path) -> None:
    """Flush a file to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _bytes(raw: Tensor) -> memoryview:
    """The memory of a tensor of bytes."""
    array: Any = raw.numpy()
    return memoryview(array)


def _files(directory: Path, single: str, index: str) -> tuple[list[Path], dict[str, Any]]:
    """The single file, if it exists; else the files and the metadata of the index.

    transformers has the same order.
    """
    if (directory / single).is_file():
        return [directory / single], {}
    if (directory / index).is_file():
        return indexed_files(directory / index), index_metadata(directory / index)
    raise NotStoredError(
        f"{directory} has no {single}", "only safetensors can be streamed", ("stream",)
    )


def check_files(directory: Path) -> None:
    """Raise if weights are damaged, or if an index names a file outside the directory."""
    if (directory / INDEX).is_file() or (directory / SINGLE).is_file():
        Shards(directory)
    elif (directory / _PICKLED_INDEX).is_file():
        indexed_files(directory / _PICKLED_INDEX)


def read_header(path: Path, *, fp8: bool = False) -> dict[str, Entry]:
    """The tensors of a safetensors file.

    Args:
        fp8: True if tensors may have floating-point numbers of 8 bits.

    Raises:
        AptError: the header is not valid, a tensor ends outside the file, or tensors overlap or
            leave gaps, which safetensors does not allow either.
    """
    header, base = _read_json(path)
    length = path.stat().st_size
    try:
        header.pop("__metadata__", None)
        _check_dtypes(path, header, fp8)
        entries = {name: _entry(path, item, base, length) for name, item in header.items()}
        _check_order(entries, base, length)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    return entries


def read_metadata(path: Path) -> dict[str, str] | None:
    """The metadata of a safetensors file; None if it has none."""
    metadata = _read_json(path)[0].get("__metadata__")
    return metadata if isinstance(metadata, dict) else None


def _read_json(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the position after it."""
    length = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_POINTER))
        if start == _POINTER:
            raise AptError(f"{path} is a pointer of Git LFS, not the file", "run: git lfs pull")
        size = int.from_bytes(start[:8], "little")
        if length < 8 or size > min(_LARGEST_HEADER, length - 8):
            raise _damaged(path, f"its header would have {size:,} of {length:,} bytes")
        file.seek(8)
        raw = file.read(size)
    try:
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise TypeError("its header is not a mapping")
    except (ValueError, TypeError, RecursionError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    return header, 8 + size


def write_header(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> bytes:
    """The beginning of a safetensors file, up to the bytes of the tensors, which have this order.

    Args:
        tensors: the name, the dtype and the shape of each tensor.
        metadata: the metadata of the file.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    start = 0
    for name, dtype, shape in tensors:
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (start, end)}
        start = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # safetensors aligns the tensors so
    return len(raw).to_bytes(8, "little") + raw


def _check_dtypes(path: Path, header: dict[str, Any], fp8: bool) -> None:
    """Raise if a tensor has a floating-point dtype of 8 bits or fewer that may not be there."""
    for name, item in header.items():
        dtype = item["dtype"]
        if fp8 and dtype in _DTYPES_FP8 and dtype in _DTYPES:
            continue
        if isinstance(dtype, str) and dtype.startswith(("F8", "F6_", "F4")):
            message = f"{name} in {path} is stored as {dtype}: the checkpoint is quantised"
            raise AptError(message, "prune the original, and quantise the result")


def _entry(path: Path, item: Any, base: int, length: int) -> Entry:
    dtype, shape = _DTYPES[item["dtype"]], tuple(item["shape"])
    begin, end = item["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError("sizes and offsets must be whole numbers from 0 on")
    size = math.prod(shape) * dtype.itemsize
    if end - begin != size or base + end > length:
        raise ValueError(f"{shape} in bytes {begin:,} to {end:,} of {length - base:,}")
    return Entry(path, dtype, shape, base + begin, size)


def _check_order(entries: dict[str, Entry], start: int, length: int) -> None:
    """Raise if tensors overlap, or if bytes belong to no tensor."""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != start:
            raise ValueError(f"{name} begins at byte {entry.start:,}, not at {start:,}")
        start += entry.size
    if start != length:
        raise ValueError(f"the tensors end at byte {start:,} of {length:,}")


def _damaged(path: Path, detail: str) -> AptError:
    return AptError(f"{path} is damaged: {detail}", "get the checkpoint again")
