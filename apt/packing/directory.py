"""Directories of packed checkpoints: written, checked and unpacked, file by file.

``config.json`` describes the packed matrices under ``quantization_config``, where transformers
looks for the format of the weights. All other tensors and files are the same as in the checkpoint.
The files of weights have other names than in plain checkpoints, so that transformers does not load
them as plain weights. The directory also has the code that opens the model without APT.
docs/packed-format.md specifies the format.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from apt import runtime
from apt.checkpoints.copies import copy_files, side_files
from apt.checkpoints.opened import Opened
from apt.checkpoints.safetensors_io import Shards, synchronise, write_files
from apt.errors import AptError, first_line
from apt.layouts.pieces import Layout
from apt.patterns import ScaleGroup
from apt.runtime.entries import (
    INDEX_PACKED,
    KEY,
    METHOD,
    OWN_CODE,
    SINGLE_PACKED,
    VERSION,
    WITH_STACKS,
    read_config,
    read_entries,
)
from apt.runtime.experts import are_matrices
from apt.runtime.matrix import FLOATS, Entry, Parts, bound, decode, encode
from apt.runtime.packed_file import CHECKSUMS, PARTS, checksums, missing_parts
from apt.runtime.rounding import encode_integers, encode_rounded
from apt.runtime.weights import check_packed_files

_CONFIG = "config.json"
_CODE = {
    "packed_file": "apt_packed_file",
    "matrix": "apt_packed_matrix",
    "remote_code": "apt_packed",
}
"""The modules of `apt.runtime` that are copied into the directory, with the names of the copies."""
OWN_CODE_FILE = f"{_CODE['remote_code']}.py"
"""The file of the class that `apt.runtime.entries.OWN_CODE` names."""
_AUTO_MAP = "auto_map"
Change = Callable[[str, Tensor], dict[str, Tensor]]
"""A function from the name of a tensor and the tensor to the tensors that replace it."""
_MODEL, _PACKED = "model", SINGLE_PACKED.partition(".")[0]
"""The stems of the names of files of weights."""


@dataclass(frozen=True)
class Packed:
    """The sizes of a packed checkpoint.

    Attributes:
        matrices: the number of packed matrices.
        dense_bytes, packed_bytes: the bytes of the tensors of these matrices before and after.
        bound_bytes: the lower bound: the entropy of the masks, the values and the scales.
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
        scale_group: the number of columns that share a scale, or a whole row.
        exact: True to use integers only for matrices that consist of integers times scales, as
            `apt.PruneOptions.quantize` makes them; all other matrices keep their values.
    """

    kind: str
    scale_group: ScaleGroup = 128
    exact: bool = False


def linear_tensors(skeleton: Opened, layout: Layout, *, blocks: bool = False) -> dict[str, str]:
    """The names of the Linear modules by the tensors of their weights.

    Two kinds of modules are left out: modules that share their weight with an embedding, since only
    dense weights can be tied, and modules of subclasses with another forward, such as Llama 4's
    router.

    Args:
        skeleton: the model, without weights.
        layout: the tensors of its parameters.
        blocks: True to leave out modules outside the blocks, such as the language-model head.
    """
    prefixes = tuple(f"{name}." for name, _ in skeleton.adapter.blocks(skeleton.module))
    users = Counter(
        map(id, dict(skeleton.module.named_parameters(remove_duplicate=False)).values())
    )
    return {
        pieces[0].key: name
        for name, module in skeleton.module.named_modules()
        for pieces in [layout.get(f"{name}.weight", ())]
        if isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and [piece.whole for piece in pieces] == [True]
        and users[id(module.weight)] == 1
        and (not blocks or name.startswith(prefixes))
    }


def expert_tensors(skeleton: Opened, layout: Layout) -> set[str]:
    """The stored tensors of stacked experts: one for each expert, or one for the stack."""
    stacks = {
        f"{name}.{site.parameter}"
        for name, block in skeleton.adapter.blocks(skeleton.module)
        for site in skeleton.adapter.sites(block)
        if site.expert is not None
    }
    return {p.key for stack in stacks if are_matrices(layout[stack]) for p in layout[stack]}


def pack(directory: Path, roundings: Mapping[str, Rounding | None], target: Path) -> Packed:
    """Write a checkpoint in which matrices are packed if that needs fewer bytes.

    Args:
        roundings: the tensors to pack, each with the rounding of its kept weights; None keeps them
            as they are.
        target: an empty directory.

    Raises:
        AptError: the checkpoint has too few zeros, or is damaged.
    """
    config = read_config(directory)
    if not roundings:
        owners = "a torch.nn.Linear module of its own, or to stacked experts"
        message = f"no weight of {directory} belongs to {owners}"
        raise AptError(message, "other modules, such as Conv1D, cannot be packed")
    shards, entries = Shards(directory), dict[str, Entry]()
    rounded = dict[str, str]()

    def packed(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if name not in roundings or tensor.ndim < 2 or tensor.dtype not in FLOATS.values():
            return {name: tensor}
        rounding = roundings[name]
        if rounding is not None and not rounding.exact:
            check_finite(name, tensor)
        entry, parts = _encoded(tensor, rounding)
        if sum(part.nbytes for part in parts.values()) >= tensor.nbytes:
            return {name: tensor}
        entries[name] = entry
        if rounding is not None and not rounding.exact:
            rounded[name] = value_hash(decode(entry, parts))
        return {f"{name}_{part}": value for part, value in parts.items()}

    def described() -> dict[str, Any]:
        return {name: entry.record() for name, entry in entries.items()}

    rewrite(shards, target, packed, _PACKED, described)
    if not entries:
        message = f"no matrix of {directory} has so many zeros that packing makes it smaller"
        raise AptError(message, "name a pruned model")
    weights = SINGLE_PACKED if len(shards.files) == 1 else INDEX_PACKED
    stacks = any(len(entry.shape) > 2 for entry in entries.values())
    version = WITH_STACKS if stacks else VERSION
    description = {"quant_method": METHOD, "version": version, "weights": weights}
    code_entry = {} if config.get(_AUTO_MAP) else {_AUTO_MAP: OWN_CODE}  # a model may have its own
    finish(
        directory, target, {**config, **code_entry, KEY: {**description, "matrices": described()}}
    )
    if code_entry:
        _write_code(target)
    error = relative_error(_verified(shards, PackedShards(target), entries, rounded))
    sizes = {name: entry.size for name, entry in stored_tensors(target).entries.items()}
    parts = sum(sizes.get(f"{name}_{part}", 0) for name in entries for part in PARTS)
    dense = sum(shards.entries[name].size for name in entries)
    bounds = sum(bound(entry) for entry in entries.values())
    return Packed(len(entries), dense, parts, bounds, sum(sizes.values()), error)


def _encoded(tensor: Tensor, rounding: Rounding | None) -> tuple[Entry, Parts]:
    """A packed matrix; a stack is packed as one matrix of all its rows."""
    matrix, rounded = tensor.flatten(0, -2), None
    if rounding is not None:
        encode_function = encode_integers if rounding.exact else encode_rounded
        rounded = encode_function(matrix, rounding.kind, rounding.scale_group)
    entry, parts = rounded or encode(matrix)
    return replace(entry, shape=tuple(tensor.shape)), parts


def unpack(directory: Path, target: Path) -> int:
    """Write a packed checkpoint as a dense one; raises `AptError` if it is damaged."""
    config, entries = read_config(directory), read_entries(directory)
    shards = PackedShards(directory)
    shards.check()

    rewrite(shards, target, lambda name, tensor: {name: tensor}, _MODEL)
    dropped = [KEY, *([_AUTO_MAP] if config.get(_AUTO_MAP) == OWN_CODE else [])]
    dense_config = {key: value for key, value in config.items() if key not in dropped}
    finish(directory, target, dense_config, [f"{name}.py" for name in _CODE.values()])
    written = Shards(target)
    for name in entries:
        if not _same(written.read(name), shards.read(name)):
            raise RuntimeError(f"{name} was not unpacked exactly")
    return len(entries)


class PackedShards(Shards):
    """The tensors of a packed directory, expanded to the tensors of the plain checkpoint."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, SINGLE_PACKED, INDEX_PACKED)
        self._stored = stored_tensors(directory)
        self._matrices = read_entries(directory)
        if missing := missing_parts(self.entries, self._matrices):
            message = f"{directory} lacks {missing[0]}, which its config.json describes"
            raise AptError(message, "is the checkpoint complete?")
        for name, entry in self._matrices.items():
            parts_on_disk = [self.entries.pop(f"{name}_{part}", None) for part in PARTS]
            first_part = next(first_part for first_part in parts_on_disk if first_part is not None)
            self.entries[name] = replace(first_part, dtype=FLOATS[entry.dtype], shape=entry.shape)

    def read(self, name: str) -> Tensor:
        """Read a tensor, or expand a matrix (out, in); raises `AptError` if it is damaged."""
        if name not in self._matrices:
            return super().read(name)
        parts = {part: f"{name}_{part}" for part in PARTS}
        stored = {part: self._stored.read(k) for part, k in parts.items() if k in self._stored}
        try:
            return decode(self._matrices[name], stored)
        except (KeyError, ValueError) as error:
            raise AptError(
                f"{name} is damaged: {first_line(error)}", "pack the model again"
            ) from error

    def check(self) -> None:
        """Compare all tensors and descriptions with their checksums; raises `AptError`."""
        records = {name: entry.record() for name, entry in self._matrices.items()}
        check_packed_files(self.files, records)


def loaded_bytes(directory: Path) -> int:
    """The bytes of the tensors of a packed directory in memory, where masks are not compressed."""
    stored, matrices = stored_tensors(directory).entries, read_entries(directory).values()
    masks = sum(entry.mask_bytes - entry.stored for entry in matrices)
    return masks + sum(entry.size for entry in stored.values())


def stored_tensors(directory: Path) -> Shards:
    """The tensors of a packed directory in their packed form."""
    return Shards(directory, SINGLE_PACKED, INDEX_PACKED)


def rewrite(
    shards: Shards,
    target: Path,
    change: Change,
    stem: str = _MODEL,
    described: Callable[[], Mapping[str, Any]] | None = None,
) -> None:
    """Write each file of weights with changed tensors, and the index.

    Args:
        change: called with each tensor.
        stem: the beginning of the names of the files.
        described: returns the descriptions of the matrices packed so far, for files with checksums;
            None for files without checksums.
    """

    def parts() -> Iterator[tuple[Parts, dict[str, str] | None]]:
        for path in shards.files:
            tensors: Parts = {}
            for name, entry in shards.entries.items():
                if entry.file == path:
                    tensors |= change(name, shards.read(name))
            with safe_open(path, "pt") as file:
                metadata = {k: v for k, v in (file.metadata() or {}).items() if k != CHECKSUMS}
            if described is not None:
                metadata[CHECKSUMS] = checksums(tensors, described())
            yield tensors, metadata or None

    write_files(target, parts(), len(shards.files), stem, shards.about)


def finish(
    directory: Path, target: Path, config: Mapping[str, Any], without: Collection[str] = ()
) -> None:
    """Copy the side files except those named in ``without``, and write the configuration."""
    files = (path for path in side_files(directory) if path.name not in without)
    copy_files(files, directory, target)
    text = json.dumps(config, indent=2) + "\n"
    (target / _CONFIG).write_text(text, encoding="utf-8")
    synchronise(target / _CONFIG)


def _write_code(target: Path) -> None:
    """Copy the modules that open the model without APT."""
    for module, name in _CODE.items():
        text = resources.files(runtime).joinpath(f"{module}.py").read_text(encoding="utf-8")
        for other, copy_name in _CODE.items():
            text = text.replace(f"from apt.runtime.{other} import", f"from .{copy_name} import")
        (target / f"{name}.py").write_text(text, encoding="utf-8")


def relative_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The squared errors relative to the original squares, in fp64: 1e30² is beyond fp32."""
    error = norm = 0.0
    for matrix, original in pairs:
        error += float((matrix.double() - original.double()).square().sum())
        norm += float(original.double().square().sum())
    return error / norm if norm else 0.0


def _verified(
    shards: Shards, written: PackedShards, entries: Mapping[str, Entry], rounded: Mapping[str, str]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each matrix on disk and its original, after a check.

    Without rounding, the two must be equal byte for byte, except for negative zeros. With rounding,
    the matrix on disk must have the `value_hash` of the rounded original: another search of its
    scales would take most of the time.
    """
    for name in entries:
        matrix, original = written.read(name), shards.read(name)
        original.masked_fill_(original == 0, 0)  # makes negative zeros positive
        same = value_hash(matrix) == rounded[name] if name in rounded else _same(matrix, original)
        if not same:
            raise RuntimeError(f"{name} was not packed exactly")
        yield matrix, original


def value_hash(tensor: Tensor) -> str:
    """The SHA-256 of the values of a tensor."""
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().data
    return hashlib.sha256(data).hexdigest()


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise if a weight is not finite."""
    if not torch.isfinite(tensor).all():
        raise AptError(f"{name} holds values that are not finite", "the checkpoint is damaged")


def _same(one: Tensor, other: Tensor) -> bool:
    """True if two matrices have the same bytes."""
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
