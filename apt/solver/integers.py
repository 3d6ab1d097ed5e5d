"""Kept weights rounded to integers, so that later roundings make up for earlier ones."""

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
    starts with the weights as they are and rounds one column after the other, each to the best
    value given the errors of the columns before it; it is the error feedback of GPTQ (arXiv
    2210.17323) with the columns behind it unchanged. Each further pass rounds each column again,
    given all others, and never makes a row worse (as QuantEase, arXiv 2309.01885). Zeros stay.

    Args:
        weight: ``W`` (out, in) in fp32, with zeros where it is pruned.
        matrix: the damped Gram matrix ``H`` (in, in).
        grid: the integers.
        dtype: the dtype of the scales and of the result as it is stored; the result is in fp32.
        passes: the number of passes.
    """
    kept = weight != 0
    spread = scales_of(weight, matrix.diagonal(), grid, dtype)
    width = weight.shape[1]
    spread = spread.repeat_interleave(grid.columns(width), 1)[:, :width]
    values = weight.clone()
    for _ in range(passes):
        _descend(values, weight, matrix, kept, spread, grid.most, dtype)
    return values


def _descend(
    values: Tensor,
    weight: Tensor,
    matrix: Tensor,
    kept: Tensor,
    spread: Tensor,
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
        for place in range(block.stop - start):
            column = start + place
            wanted = values[:, column] - local[:, place] / diagonal[column]
            scale = spread[:, column]
            level = (wanted / scale).round().clamp(-most, most)
            value = (level * scale).to(dtype).float() * kept[:, column] + 0.0  # no negative zeros
            local += (value - values[:, column]).unsqueeze(1) * inside[place]
            values[:, column] = value
        if block.stop < weight.shape[1]:
            rest = slice(block.stop, None)
            gradient[:, rest] += (values[:, block] - before) @ matrix[block, rest]


def scales_of(weight: Tensor, importance: Tensor, grid: IntegerGrid, dtype: torch.dtype) -> Tensor:
    """The scale of each group (out, groups), rounded to the stored dtype, in fp32.

    It is the one with the least weighted squared error among some from 0.6 to 1 times the one that
    reaches the largest weight: a smaller one cuts off the largest weights and is finer for all
    others. It is above 0, for groups without weights as well.

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
        some = torch.nn.functional.pad(weight[start : start + step], (0, missing))
        parts = some.view(-1, groups, group)
        scales[start : start + step] = _best_scales(parts, weighting, grid.most, dtype)
    return scales


def _best_scales(parts: Tensor, weighting: Tensor, most: int, dtype: torch.dtype) -> Tensor:
    """The scale of each group of some rows (rows, groups, group), see `scales_of`."""
    whole = (parts.abs().amax(2) / most).clamp_min(1e-30)
    scales, best = whole, torch.full_like(whole, math.inf)
    least = torch.finfo(dtype).tiny / 2**8  # a subnormal number, since scales of fp16 are small
    levels = torch.empty_like(parts)
    for factor in _SHRINK:
        scale = (whole * factor).to(dtype).float().clamp_min(least)
        torch.div(parts, scale.unsqueeze(2), out=levels)
        levels.round_().clamp_(-most, most).mul_(scale.unsqueeze(2)).sub_(parts).square_()
        error = levels.mul_(weighting).sum(2)
        better = error < best
        scales, best = torch.where(better, scale, scales), torch.where(better, error, best)
    return scales
