"""The rounding of kept weights to a grid: later columns compensate for earlier errors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from apt.patterns import Grid, Points
from apt.solver.precision import full_precision

_BLOCK = 128  # columns between two updates of the gradient of all columns


@dataclass(frozen=True)
class Rounded:
    """A rounded weight.

    Attributes:
        weight: the points (out, in) in fp32.
        indices: the index of the level of each point (out, in).
        points: the points of the grid for this weight.
        grid: the grid.
    """

    weight: Tensor
    indices: Tensor
    points: Points
    grid: Grid


@full_precision()
def rounded(
    weight: Tensor, matrix: Tensor, grid: Grid, dtype: torch.dtype = torch.float32, passes: int = 4
) -> Rounded:
    """Weights (out, in) on a grid, with outputs near those of ``weight``.

    Minimises ``tr((Q − W) H (Q − W)ᵀ)`` over the points by coordinate descent. The first pass
    rounds one column after the other, each to the best value given the errors of the columns before
    it. It is the error feedback of GPTQ (arXiv 2210.17323) without the update of later columns.
    Each further pass rounds each column again, given all other columns, and never increases the
    loss of a row (as QuantEase, arXiv 2309.01885). Zeros stay if the grid has them.

    Args:
        weight: ``W`` (out, in) in fp32, with zeros where it is pruned.
        matrix: the damped Gram matrix ``H`` (in, in).
        grid: the grid.
        dtype: the dtype of the scales and of the result as it is stored; the result is in fp32.
        passes: the number of passes.
    """
    kept = weight != 0 if grid.holds_zero else None
    points = grid.points(weight, matrix.diagonal(), dtype)
    values, indices = weight.clone(), torch.empty_like(weight)
    for _ in range(passes):
        _descend(values, indices, weight, matrix, kept, points)
    return Rounded(values, indices, points, grid)


def _descend(
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    matrix: Tensor,
    kept: Tensor | None,
    points: Points,
) -> None:
    """Round each column once, in place."""
    gradient = (values - weight) @ matrix
    diagonal = matrix.diagonal()
    for start in range(0, weight.shape[1], _BLOCK):
        block = slice(start, min(start + _BLOCK, weight.shape[1]))
        before, inside = values[:, block].clone(), matrix[block, block]
        # Columns as rows: a step reads whole columns, and changes the gradient of those after it.
        columns, local = _columns(before), gradient[:, block].T.contiguous()
        slopes, couplings = local.unbind(), inside.unsqueeze(2).unbind()
        masks = None if kept is None else _columns(kept[:, block])
        found = list[tuple[Tensor, Tensor]]()
        for offset, (old, scale) in enumerate(zip(columns, diagonal[block].unbind(), strict=True)):
            optimum = old - slopes[offset] / scale
            if masks is not None:
                optimum *= masks[offset]  # before the choice of a level: indices agree with zeros
            index = points.nearest(optimum, start + offset)
            value = points.points(index, start + offset) + 0.0  # no negative zeros
            local[offset + 1 :].add_(couplings[offset][offset + 1 :] * (value - old))
            found.append((value, index))
        values[:, block], indices[:, block] = (
            torch.stack(each, 1) for each in zip(*found, strict=True)
        )
        if block.stop < weight.shape[1]:
            rest = slice(block.stop, None)
            gradient[:, rest] += (values[:, block] - before) @ matrix[block, rest]


def _columns(matrix: Tensor) -> tuple[Tensor, ...]:
    """The columns of a matrix, each contiguous."""
    return matrix.T.contiguous().unbind()
