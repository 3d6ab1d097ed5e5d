"""A file of a packed checkpoint: its tensors, with a checksum for each in its header.

`apt-prune pack` copies this module and `apt.runtime.matrix` beside the weights, for machines
without APT. So the two import nothing else of APT.
"""

import json
import os
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from apt.runtime.matrix import MASK, SCALES, VALUES, Entry, decode

CHECKSUMS = "apt_checksums"
"""The entry of a file's metadata with the checksums, as JSON."""

PARTS = (MASK, VALUES, SCALES)


def checksum(tensor: Tensor) -> str:
    """The CRC-32 of a tensor's dtype, shape and bytes."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    named = f"{tensor.dtype} {list(tensor.shape)}"
    return f"{zlib.crc32(raw.data, zlib.crc32(named.encode())):08x}"


def record_checksum(record: Mapping[str, Any]) -> str:
    """The CRC-32 of the description of a packed matrix."""
    return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"


def checksums(tensors: Mapping[str, Tensor], matrices: Mapping[str, Mapping[str, Any]]) -> str:
    """The checksums of tensors and of the descriptions of their matrices, as JSON.

    Args:
        tensors: the tensors of a file.
        matrices: the descriptions of all packed matrices, by name.
    """
    found = {name: checksum(tensor) for name, tensor in tensors.items()}
    for name in matrix_names(tensors, matrices):
        found[name] = record_checksum(matrices[name])
    return json.dumps(found)


def matrix_names(tensors: Collection[str], matrices: Collection[str]) -> list[str]:
    """The packed matrices whose masks are among these tensors."""
    return [name for name in matrices if f"{name}_{MASK}" in tensors]


def checked_tensors(
    path: str | os.PathLike[str], matrices: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file as they are stored, each compared with its checksum.

    Args:
        path: the file.
        matrices: the descriptions of all packed matrices, by name.

    Raises:
        ValueError: a checksum is missing or differs.
    """
    with safe_open(path, "pt") as file:
        known = _part(file.metadata())
        names = list(file.keys())
        described = matrix_names(names, matrices)
        if known.keys() != {*names, *described}:
            raise ValueError("its tensors are not those of its checksums")
        for name in described:
            _compare(f"the description of {name}", known[name], record_checksum(matrices[name]))
        for name in names:
            tensor = file.get_tensor(name)
            _compare(name, known[name], checksum(tensor))
            yield name, tensor


def _part(metadata: Mapping[str, str] | None) -> dict[str, str]:
    try:
        return dict(json.loads((metadata or {})[CHECKSUMS]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError("it has no checksums that can be read") from error


def _compare(name: str, known: str, found: str) -> None:
    if known != found:
        raise ValueError(f"{name} differs from its checksum")


def missing_parts(tensors: Collection[str], entries: Mapping[str, Entry]) -> list[str]:
    """The tensors that packed matrices need and that are not among these.

    Args:
        tensors: the names of all tensors of a checkpoint.
        entries: the descriptions of its packed matrices, by name.
    """
    needed = (
        f"{name}_{part}"
        for name, entry in entries.items()
        for part in (MASK, VALUES, *([SCALES] if entry.group else []))
    )
    return [key for key in needed if key not in tensors]


def dense_tensors(
    path: str | os.PathLike[str], matrices: Mapping[str, Mapping[str, Any]]
) -> dict[str, Tensor]:
    """The tensors of a file with its matrices expanded, as in the plain checkpoint.

    Args:
        path: the file.
        matrices: the descriptions of all packed matrices, by name.

    Raises:
        ValueError: it is damaged.
    """
    tensors = dict(checked_tensors(path, matrices))
    entries = {name: Entry.read(matrices[name]) for name in matrix_names(tensors, matrices)}
    if missing := missing_parts(tensors, entries):
        raise ValueError(f"it lacks {missing[0]}")
    for name, entry in entries.items():
        parts = {part: tensors.pop(f"{name}_{part}", None) for part in PARTS}
        given = {part: tensor for part, tensor in parts.items() if tensor is not None}
        tensors[name] = decode(entry, given)
    return tensors
