"""Directories of packed checkpoints: written, checked and unpacked, file by file.

``config.json`` describes the packed matrices under ``quantization_config``, where transformers
looks for the way in which weights are stored. All other tensors and files are those of the
checkpoint.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from apt.checkpoints.copies import copy_files, side_files, synchronise
from apt.checkpoints.model import Model
from apt.checkpoints.safetensors_io import INDEX, SINGLE, Shards, write_index
from apt.checkpoints.tensor_map import layout_of
from apt.errors import AptError, first_line
from apt.runtime.entries import KEY, METHOD, VERSION, read_config, read_entries
from apt.runtime.matrix import FLOATS, MASK, SCALES, VALUES, Entry, Parts, bound, decode, encode
from apt.runtime.rounding import encode_integers, encode_rounded

_CONFIG = "config.json"
Change = Callable[[str, Tensor], dict[str, Tensor]]
"""A function from a tensor and its name to the tensors that take its place."""
_OPTIONAL = (SCALES,)


@dataclass(frozen=True)
class Packed:
    """What packing made of a checkpoint.

    Attributes:
        matrices: the number of packed matrices.
        dense_bytes, packed_bytes: the bytes of their tensors before and after.
        bound_bytes: the least bytes: the entropy of the masks, the values and the scales.
        total_bytes: the bytes of all tensors of the packed checkpoint.
        relative_error: the squared rounding errors of the packed matrices, relative to the squares
            of their weights; 0 without rounding.
    """

    matrices: int
    dense_bytes: int
    packed_bytes: int
    bound_bytes: float
    total_bytes: int
    relative_error: float = 0.0


@dataclass(frozen=True)
class Rounding:
    """The rounding of kept weights to integers.

    Args:
        kind: ``int8`` or ``int4``.
        group: the number of columns that share a scale.
        exact: True to use integers only for matrices that consist of integers times scales, which
            `apt.PruneOptions.quantize` makes; all others keep their values.
    """

    kind: str
    group: int = 128
    exact: bool = False


def linear_tensors(shell: Model, shards: Shards, *, blocks: bool = False) -> dict[str, str]:
    """The Linear modules by the tensors of their weights.

    A module that shares its weight with an embedding is left out: only dense weights can be tied.

    Args:
        shell: the model, without weights.
        shards: the tensors of the checkpoint.
        blocks: True to leave out modules outside the blocks, such as the language-model head.

    Raises:
        NotStoredError: the checkpoint stores parameters differently than the model.
    """
    layout = layout_of(shell, shards)
    inside = tuple(f"{name}." for name, _ in shell.adapter.blocks(shell.module))
    shared = Counter(map(id, dict(shell.module.named_parameters(remove_duplicate=False)).values()))
    return {
        layout[f"{name}.weight"][0].key: name
        for name, module in shell.module.named_modules()
        if isinstance(module, nn.Linear)
        and f"{name}.weight" in layout
        and shared[id(module.weight)] == 1
        and (not blocks or name.startswith(inside))
    }


def pack(
    directory: Path, names: Collection[str], target: Path, rounding: Rounding | None = None
) -> Packed:
    """Write a checkpoint without the zeros of some matrices, where that needs fewer bytes.

    Args:
        directory: the checkpoint.
        names: the tensors that may be packed.
        target: an empty directory.
        rounding: the rounding of the kept weights; None keeps them as they are.

    Raises:
        AptError: the checkpoint is packed already, has too few zeros, or is damaged.
    """
    config = read_config(directory)
    if KEY in config:
        raise AptError(f"{directory} is packed or quantised already")
    if not names:
        raise AptError(
            f"no weight of {directory} belongs to a torch.nn.Linear module of its own",
            "other modules, such as Conv1D, cannot be packed",
        )
    shards, entries, dense = Shards(directory), dict[str, Entry](), 0

    def packed(name: str, tensor: Tensor) -> dict[str, Tensor]:
        nonlocal dense
        if name not in names or tensor.ndim != 2 or tensor.dtype not in FLOATS.values():
            return {name: tensor}
        entry, parts = _encoded(tensor, rounding)
        if sum(part.nbytes for part in parts.values()) >= tensor.nbytes:
            return {name: tensor}
        entries[name] = entry
        dense += tensor.nbytes
        return {f"{name}_{part}": value for part, value in parts.items()}

    rewrite(shards, directory, target, packed)
    if not entries:
        raise AptError(
            f"no matrix of {directory} has so many zeros that packing makes it smaller",
            "name a pruned model",
        )
    described = {name: entry.record() for name, entry in entries.items()}
    about = {"quant_method": METHOD, "version": VERSION, "matrices": described}
    finish(directory, target, {**config, KEY: about})
    written = Shards(target)
    error = _verify(shards, written, entries, rounding)
    sizes = {name: entry.size for name, entry in written.entries.items()}
    parts = [size for name, size in sizes.items() if _matrix(name, entries)]
    bounds = sum(bound(entry) for entry in entries.values())
    return Packed(len(entries), dense, sum(parts), bounds, sum(sizes.values()), error)


def _encoded(tensor: Tensor, rounding: Rounding | None) -> tuple[Entry, Parts]:
    if rounding is None:
        return encode(tensor)
    if rounding.exact:
        return encode_integers(tensor, rounding.kind, rounding.group) or encode(tensor)
    return encode_rounded(tensor, rounding.kind, rounding.group)


def unpack(directory: Path, target: Path) -> int:
    """Write a packed checkpoint as a dense one, and return the number of matrices.

    Args:
        directory: the packed checkpoint.
        target: an empty directory.

    Raises:
        AptError: it is not packed, has a newer version, or is damaged.
    """
    config, entries, shards = read_config(directory), read_entries(directory), Shards(directory)
    _check_complete(directory, shards, entries)

    def unpacked(name: str, tensor: Tensor) -> dict[str, Tensor]:
        matrix = _matrix(name, entries)
        if matrix is None:
            return {name: tensor}
        if name != f"{matrix}_{MASK}":
            return {}
        return {matrix: read_matrix(shards, matrix, entries[matrix])}

    rewrite(shards, directory, target, unpacked)
    finish(directory, target, {name: v for name, v in config.items() if name != KEY})
    written = Shards(target)
    for name, entry in entries.items():
        if not _same(written.read(name), read_matrix(shards, name, entry)):
            raise RuntimeError(f"{name} was not unpacked exactly")
    return len(entries)


def _check_complete(directory: Path, shards: Shards, entries: Mapping[str, Entry]) -> None:
    """Raise if a tensor of a packed matrix is missing."""
    for name, entry in entries.items():
        for part in (MASK, VALUES, *([SCALES] if entry.group else [])):
            if f"{name}_{part}" not in shards:
                raise AptError(
                    f"{directory} lacks {name}_{part}, which its config.json describes",
                    "is the checkpoint complete?",
                )


def read_matrix(shards: Shards, name: str, entry: Entry) -> Tensor:
    """A packed matrix (out, in).

    Raises:
        AptError: its tensors are missing or damaged.
    """
    try:
        return decode(entry, _parts(shards, name))
    except (KeyError, ValueError) as error:
        raise AptError(f"{name} is damaged: {first_line(error)}", "pack the model again") from error


def _parts(shards: Shards, name: str) -> Parts:
    found = {part: f"{name}_{part}" for part in (MASK, VALUES, SCALES)}
    return {p: shards.read(key) for p, key in found.items() if key in shards or p not in _OPTIONAL}


def _matrix(name: str, entries: Collection[str]) -> str | None:
    """The packed matrix that a tensor belongs to; None if to none."""
    matrix, _, part = name.rpartition("_")
    return matrix if part in (MASK, VALUES, SCALES) and matrix in entries else None


def rewrite(shards: Shards, directory: Path, target: Path, change: Change) -> None:
    """Write each file of weights with changed tensors, and the index."""
    places: dict[str, str] = {}
    total = 0
    for path in shards.files:
        made: dict[str, Tensor] = {}
        for name in _names(shards, path):
            made |= change(name, shards.read(name))
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file(made, target / path.name, metadata)
        synchronise(target / path.name)
        places |= dict.fromkeys(made, path.name)
        total += sum(tensor.nbytes for tensor in made.values())
    if shards.files[0].name != SINGLE:
        about = json.loads((directory / INDEX).read_text(encoding="utf-8")).get("metadata")
        known = about if isinstance(about, dict) else {}
        write_index(target, {**known, "total_size": total}, places)


def _names(shards: Shards, path: Path) -> Iterator[str]:
    return (name for name, entry in shards.entries.items() if entry.file == path)


def finish(directory: Path, target: Path, config: Mapping[str, Any]) -> None:
    """Copy all files beside the weights, and write the configuration."""
    copy_files(side_files(directory), directory, target)
    text = json.dumps(config, indent=2) + "\n"
    (target / _CONFIG).write_text(text, encoding="utf-8")
    synchronise(target / _CONFIG)


def _verify(
    shards: Shards, written: Shards, entries: Mapping[str, Entry], rounding: Rounding | None
) -> float:
    """Check each matrix on disk against the original, and return the relative rounding error.

    Without rounding they are equal byte for byte, but for negative zeros. With rounding the matrix
    on disk is the one that was computed, and has the same zeros or more.
    """
    lost = whole = 0.0
    for name, entry in entries.items():
        matrix = read_matrix(written, name, entry)
        original = shards.read(name)
        original.masked_fill_(original == 0, 0)  # which makes negative zeros positive
        lossless = rounding is None or rounding.exact
        expected = original if lossless else decode(*_encoded(original, rounding))
        if not _same(matrix, expected):
            raise RuntimeError(f"{name} was not packed exactly")
        lost += float((matrix.float() - original.float()).square().sum(dtype=torch.float64))
        whole += float(original.float().square().sum(dtype=torch.float64))
    return lost / whole if whole else 0.0


def _same(one: Tensor, other: Tensor) -> bool:
    """True if two matrices have the same bytes."""
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
