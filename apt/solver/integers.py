"""The rounding of kept weights to integers: later columns compensate for earlier errors."""

import math

import torch
from torch import Tensor

from apt.patterns import IntegerGrid
from apt.solver.precision import full_precision

_SHRINK = torch.linspace(1, 0.6, 17).tolist()  # factors of the scale that are tried
_CHUNK = 2**17  # weights whose scales are searched at a time: they stay in the cache
_BLOCK = 128  # columns between two updates of the gradient of all columns


@full_precision()
def rounded(
    weight: Tensor,
    matrix: Tensor,
    grid: IntegerGrid,
    dtype: torch.dtype = torch.float32,
    passes: int = 4,
) -> Tensor:
    """Weights (out, in) that are integers times a scale, with outputs near those of ``weight``.

    Minimises ``tr((Q − W) H (Q − W)ᵀ)`` over the integers by coordinate descent. The first pass
    rounds one column after the other, each to the best value given the errors of the columns before
    it. It is the error feedback of GPTQ (arXiv 2210.17323) without the update of later columns.
    Each further pass rounds each column again, given all other columns, and never increases the
    loss of a row (as QuantEase, arXiv 2309.01885). Zeros stay.

    Args:
        weight: ``W`` (out, in) in fp32, with zeros where it is pruned.
        matrix: the damped Gram matrix ``H`` (in, in).
        grid: the integers.
        dtype: the dtype of the scales and of the result as it is stored; the result is in fp32.
        passes: the number of passes.
    """
    kept = weight != 0
    scales = scales_of(weight, matrix.diagonal(), grid, dtype)
    width = weight.shape[1]
    scales = scales.repeat_interleave(grid.columns(width), 1)[:, :width]
    values = weight.clone()
    for _ in range(passes):
        _descend(values, weight, matrix, kept, scales, grid.most, dtype)
    return values


def _descend(
    values: Tensor,
    weight: Tensor,
    matrix: Tensor,
    kept: Tensor,
    scales: Tensor,
    most: int,
    dtype: torch.dtype,
) -> None:
    """Round each column once, in place."""
    gradient = (values - weight) @ matrix
    diagonal = matrix.diagonal()
    for start in range(0, weight.shape[1], _BLOCK):
        block = slice(start, min(start + _BLOCK, weight.shape[1]))
        before, inside = values[:, block].clone(), matrix[block, block]
        local = gradient[:, block]
        for offset in range(block.stop - start):
            column = start + offset
            optimum = values[:, column] - local[:, offset] / diagonal[column]
            scale = scales[:, column]
            level = (optimum / scale).round().clamp(-most, most)
            value = (level * scale).to(dtype).float() * kept[:, column] + 0.0  # no negative zeros
            local += (value - values[:, column]).unsqueeze(1) * inside[offset]
            values[:, column] = value
        if block.stop < weight.shape[1]:
            rest = slice(block.stop, None)
            gradient[:, rest] += (values[:, block] - before) @ matrix[block, rest]


def scales_of(weight: Tensor, importance: Tensor, grid: IntegerGrid, dtype: torch.dtype) -> Tensor:
    """The scale of each group (out, groups), rounded to the stored dtype, in fp32.

    The full scale maps the largest weight to the largest integer. Candidates are the full scale
    times factors from 0.6 to 1, and the one with the least weighted squared error is chosen. A
    smaller scale clips the largest weights and is finer for all others. Scales are above 0, also
    for groups without weights.

    Args:
        weight: the weights (out, in) in fp32.
        importance: the weight of the error of each column (in,).
    """
    rows, columns = weight.shape
    group = grid.columns(columns)
    groups = math.ceil(columns / group)
    missing = groups * group - columns
    weighting = torch.nn.functional.pad(importance, (0, missing)).view(groups, group)
    scales = weight.new_empty(rows, groups)
    step = max(1, _CHUNK // max(1, groups * group))
    for start in range(0, rows, step):
        chunk = torch.nn.functional.pad(weight[start : start + step], (0, missing))
        parts = chunk.view(-1, groups, group)
        scales[start : start + step] = _best_scales(parts, weighting, grid.most, dtype)
    return scales


def _best_scales(parts: Tensor, weighting: Tensor, most: int, dtype: torch.dtype) -> Tensor:
    """The scale of each group of some rows (rows, groups, group), see `scales_of`."""
    full_scale = (parts.abs().amax(2) / most).clamp_min(1e-30)
    scales, best = full_scale, torch.full_like(full_scale, math.inf)
    least = torch.finfo(dtype).tiny / 2**8  # a subnormal number, since scales of fp16 are small
    levels = torch.empty_like(parts)
    for factor in _SHRINK:
        scale = (full_scale * factor).to(dtype).float().clamp_min(least)
        torch.div(parts, scale.unsqueeze(2), out=levels)
        levels.round_().clamp_(-most, most).mul_(scale.unsqueeze(2)).sub_(parts).square_()
        error = levels.mul_(weighting).sum(2)
        better = error < best
        scales, best = torch.where(better, scale, scales), torch.where(better, error, best)
    return scales
