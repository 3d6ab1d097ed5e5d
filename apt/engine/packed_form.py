"""What a packed directory of a model can hold: the levels of its matrices, and their sizes."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from apt.adapter.text_config import cache_width, text_config
from apt.checkpoints.opened import Opened
from apt.checkpoints.safetensors_io import read_metadata
from apt.checkpoints.stored import Stored, find_stored
from apt.errors import AptError
from apt.fit.levels import FileForm, Level
from apt.fit.outer import outer_names
from apt.layouts.pieces import Layout, Piece
from apt.packing.directory import expert_tensors, linear_tensors
from apt.packing.sizes import StoredMatrices, file_bytes, header_bytes
from apt.patterns import Granularity, IntegerGrid, Pattern, ScaleGroup, Unstructured
from apt.planning.plan import Plan, PlannedSite

SHARES = (0.3, 0.4, 0.5, 0.6, 0.7)
"""The shares of zeros of the levels."""

KINDS = (8, 4)
"""The bits of the integers of the levels."""

_LARGEST_FILE = 5 * 10**9  # bytes; transformers writes no larger file of weights
_VECTOR = torch.float32  # the widest dtype in which transformers may keep a vector


@dataclass(frozen=True)
class Means:
    """The means by which matrices become smaller.

    Attributes:
        shares: the shares of zeros; empty for no zeros.
        grids: the grids of integers; empty for the stored dtype alone.
        per: the unit over which a share is counted.
    """

    shares: Sequence[float]
    grids: Sequence[IntegerGrid]
    per: Granularity

    @classmethod
    def named(cls, names: Collection[str], group: ScaleGroup, per: Granularity) -> "Means":
        """The means with these names, ``zeros`` and ``bits``."""
        grids = tuple(IntegerGrid(bits, group) for bits in KINDS)
        return cls(SHARES if "zeros" in names else (), grids if "bits" in names else (), per)

    def forms(self) -> Iterator[tuple[Pattern | None, IntegerGrid | None]]:
        """All pairs of a pattern and a grid, the denser ones first; without the stored form."""
        patterns = [None, *(Unstructured(share, self.per) for share in self.shares)]
        yield from ((p, grid) for grid in (None, *self.grids) for p in patterns if p or grid)


@dataclass(frozen=True)
class PackedForm:
    """What a packed directory of a model can hold.

    Attributes:
        form: the levels of the matrices, and the bytes of all other tensors and of the headers.
        matrices: the stored matrices of each parameter with levels.
    """

    form: FileForm
    matrices: Mapping[str, StoredMatrices]

    @property
    def dense(self) -> int:
        """The bytes of the files with dense matrices."""
        return self.form.rest + sum(matrices.dense for matrices in self.matrices.values())


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of the dense directory of a run, as it will be written.

    Attributes:
        tensors: the dtype and the shape of each tensor.
        layout: the tensors of each parameter.
        files: the metadata of each file.
        split: the number of tensors into which a stack of experts may be split.
    """

    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    layout: Layout
    files: Sequence[Mapping[str, str] | None]
    split: int = 1

    @property
    def bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.tensors.values())


def cache_bytes(skeleton: Opened, context: int, dtype: torch.dtype | None) -> int:
    """The bytes of the keys and values of a number of tokens, in all blocks.

    Raises:
        AptError: the configuration does not give their sizes.
    """
    width = cache_width(skeleton.config)
    if width is None:
        message = f"{skeleton.source.reference} has no cache of keys and values of a known size"
        raise AptError(message, "give the size of the weights", ("memory", "size"))
    numbers = 2 * int(text_config(skeleton.config).num_hidden_layers) * width * context
    return numbers * (dtype or skeleton.dtype).itemsize


def packed_form(
    skeleton: Opened, plan: Plan, means: Means, dtype: torch.dtype | None, cache: int | None = None
) -> PackedForm:
    """The levels of the matrices of a model that a packed directory can hold in packed form.

    Args:
        plan: the sites of the model.
        dtype: the dtype to which the weights are cast; None for that of the checkpoint.
        cache: the bytes of the cache, to count the bytes in memory; None to count those of files.
    """
    checkpoint = checkpoint_of(skeleton, dtype)
    packable = {
        *linear_tensors(skeleton, checkpoint.layout),
        *expert_tensors(skeleton, checkpoint.layout),
    }
    matrices, levels = dict[str, StoredMatrices](), dict[str, tuple[Level, ...]]()
    for name, sites in {**_heads(skeleton), **_sites(plan)}.items():
        pieces = checkpoint.layout.get(name, ())
        if pieces and all(piece.key in packable for piece in pieces):
            stacked = any(entry.site.expert is not None for entry in sites)
            found = _matrices(checkpoint, pieces, stacked=stacked, in_memory=cache is not None)
            matrices[name], levels[name] = found, tuple(_levels(found, sites, means))
    with_levels = {piece.key for name in matrices for piece in checkpoint.layout[name]}
    return PackedForm(FileForm(levels, rest_bytes(checkpoint, with_levels, cache)), matrices)


def checkpoint_of(skeleton: Opened, dtype: torch.dtype | None) -> Checkpoint:
    """The tensors of the dense directory of a run.

    Args:
        dtype: the dtype to which the weights are cast; None for that of the checkpoint.
    """
    stored = find_stored(skeleton) if dtype is None and skeleton.quantised is None else None
    return _saved(skeleton, dtype) if stored is None else _copied(stored)


def _copied(stored: Stored) -> Checkpoint:
    """The checkpoint of a run that writes a modified copy."""
    shards = stored.shards
    tensors = {name: (entry.dtype, entry.shape) for name, entry in shards.entries.items()}
    return Checkpoint(tensors, stored.layout, [read_metadata(path) for path in shards.files])


def _saved(skeleton: Opened, dtype: torch.dtype | None) -> Checkpoint:
    """The checkpoint of a run whose model is written by transformers."""
    state: Mapping[str, Tensor] = skeleton.module.state_dict(keep_vars=True)
    names = {id(tensor): name for name, tensor in state.items()}  # one name for tied weights
    matrix = dtype or skeleton.dtype
    tensors = {
        name: (matrix if state[name].ndim > 1 else _VECTOR, tuple(state[name].shape))
        for name in names.values()
    }
    experts = max((shape[0] for _, shape in tensors.values() if len(shape) > 2), default=1)
    layout = {name: (Piece(name),) for name in tensors}
    checkpoint = Checkpoint(tensors, layout, (), 2 * experts)
    count = 1 + checkpoint.bytes // _LARGEST_FILE
    return Checkpoint(tensors, layout, [{"format": "pt"}] * count, 2 * experts)


def _heads(skeleton: Opened) -> dict[str, list[PlannedSite]]:
    """The embedding and the head, which are no sites: they have no zeros."""
    return {name: [] for name in outer_names(skeleton.module)}


def _sites(plan: Plan) -> dict[str, list[PlannedSite]]:
    """The sites of each parameter, by its full name, without those that several blocks use."""
    found = dict[str, list[PlannedSite]]()
    for block in plan.blocks:
        for entry in block.pruned:
            found.setdefault(f"{block.name}.{entry.site.parameter}", []).append(entry)
    return found


def _matrices(
    checkpoint: Checkpoint, pieces: Sequence[Piece], *, stacked: bool, in_memory: bool
) -> StoredMatrices:
    tensors = [checkpoint.tensors[piece.key] for piece in pieces]
    shapes, digits = [shape for _, shape in tensors], len(str(checkpoint.bytes))
    split = checkpoint.split if stacked else 1
    return StoredMatrices(pieces, shapes, tensors[0][0], digits, split, in_memory)


def _levels(
    matrices: StoredMatrices, sites: Sequence[PlannedSite], means: Means
) -> Iterator[Level]:
    """The stored level, and all levels that are smaller than a denser one of the same grid."""
    stored = partial(matrices.expected, grid=None)
    yield Level(name_of_level(None, None, matrices.dtype), matrices.dense, expected=stored)
    smallest: dict[IntegerGrid | None, int] = {None: matrices.dense}
    is_transposed = any(entry.site.transposed for entry in sites)  # its groups are other columns
    for pattern, grid in means.forms():
        if (is_transposed and grid is not None) or (pattern is not None and not sites):
            continue
        removed = 0 if pattern is None else sum(pattern.required(entry.shape) for entry in sites)
        size = matrices.largest(matrices.weights - removed, grid)
        if size < smallest.get(grid, matrices.dense):
            smallest[grid] = size
            name = name_of_level(pattern, grid, matrices.dtype)
            expected = partial(matrices.expected, grid=grid)
            yield Level(name, size, grid, pattern, expected)


def name_of_level(pattern: Pattern | None, grid: IntegerGrid | None, dtype: torch.dtype) -> str:
    """The name of a level, such as ``int4 50%``."""
    numbers = str(dtype).removeprefix("torch.") if grid is None else grid.name
    return numbers if pattern is None else f"{numbers} {100 * pattern.sparsity:g}%"


def rest_bytes(checkpoint: Checkpoint, without: Collection[str], cache: int | None) -> int:
    """The bytes of all tensors but some, and of the cache, or of the files with their headers."""
    digits = len(str(checkpoint.bytes))
    kept = {name: x for name, x in checkpoint.tensors.items() if name not in without}
    tensors = sum(math.prod(shape) * dtype.itemsize for dtype, shape in kept.values())
    if cache is not None:
        return tensors + cache
    headers = sum(header_bytes(name, shape, digits) for name, (_, shape) in kept.items())
    return tensors + headers + sum(map(file_bytes, checkpoint.files))
