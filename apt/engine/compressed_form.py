"""What a directory in the format of compressed-tensors can hold: integers for each matrix.

vLLM computes q, k and v in one product, and gate and up in another. So the matrices that multiply
the same input have the same level.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from apt.checkpoints.opened import Opened
from apt.engine.packed_form import Means, checkpoint_of, name_of_level, rest_bytes
from apt.fit.levels import FileForm, Level
from apt.packing.compressed_tensors import part_shapes
from apt.packing.directory import linear_tensors
from apt.packing.sizes import header_bytes
from apt.patterns import IntegerGrid
from apt.planning.plan import Plan, PlannedBlock


def compressed_form(
    skeleton: Opened, plan: Plan, means: Means, dtype: torch.dtype | None
) -> FileForm:
    """The levels of the weights of the blocks' Linear modules, and the bytes of everything else.

    The sizes are the largest ones of the headers; those of the tensors are exact.

    Args:
        plan: the sites of the model.
        means: the grids of integers.
        dtype: the dtype to which the weights are cast; None for that of the checkpoint.
    """
    checkpoint = checkpoint_of(skeleton, dtype)
    linears = linear_tensors(skeleton, checkpoint.layout, blocks=True)
    digits, levels = len(str(checkpoint.bytes)), dict[str, tuple[Level, ...]]()
    for block in plan.blocks:
        for entry in block.pruned:
            name = f"{block.name}.{entry.site.parameter}"
            pieces = checkpoint.layout.get(name, ())
            if [piece.key in linears for piece in pieces] == [True] and not entry.site.routed:
                kind, shape = checkpoint.tensors[pieces[0].key]
                matrix = _Matrix(pieces[0].key, shape, kind, digits)
                levels[name] = tuple(matrix.levels(means.grids))
    stored = {piece.key for name in levels for piece in checkpoint.layout[name]}
    tied = tuple(group for block in plan.blocks for group in _tied(block, levels))
    return FileForm(levels, rest_bytes(checkpoint, stored, None), tied)


def _tied(block: PlannedBlock, levels: Collection[str]) -> Iterator[tuple[str, ...]]:
    """The parameters of a block that multiply the same input."""
    inputs = dict[str, list[str]]()
    for entry in block.pruned:
        if (name := f"{block.name}.{entry.site.parameter}") in levels:
            inputs.setdefault(entry.site.input, []).append(name)
    yield from (tuple(names) for names in inputs.values() if len(names) > 1)


@dataclass(frozen=True)
class _Matrix:
    """A stored matrix.

    Attributes:
        key: the name of its tensor.
        shape: (out, in).
        dtype: the dtype in which it is stored.
        digits: the number of digits of the largest offset in a file.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    digits: int

    def levels(self, grids: Sequence[IntegerGrid]) -> Iterator[Level]:
        """The stored level, and the integers whose groups divide the columns."""
        dense = math.prod(self.shape) * self.dtype.itemsize
        header = header_bytes(self.key, self.shape, self.digits, checked=False)
        yield Level(name_of_level(None, None, self.dtype), dense + header)
        for grid in grids:
            if grid.group == "row" or self.shape[1] % grid.group == 0:
                yield Level(grid.name, self._bytes(grid), grid)

    def _bytes(self, grid: IntegerGrid) -> int:
        """The bytes of the parts of the matrix as integers."""
        stem = self.key.removesuffix("weight")
        return sum(
            math.prod(shape) * dtype.itemsize
            + header_bytes(f"{stem}{part}", shape, self.digits, checked=False)
            for part, (dtype, shape) in part_shapes(self.shape, self.dtype, grid).items()
        )
