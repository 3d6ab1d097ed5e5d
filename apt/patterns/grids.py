"""Grids: the points to which kept weights are rounded, and how a file stores them."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

ScaleGroup = int | Literal["row"]
"""A number of columns that share a scale, or a whole row."""

COLUMNS = 64
"""Groups are multiples of this number, as the kernels for packed matrices need them."""

_SHRINK = torch.linspace(1, 0.6, 17).tolist()  # factors of the scale that are tried
_CHUNK = 2**17  # weights whose scales are searched at a time: they stay in the cache


@dataclass(frozen=True)
class Points:
    """The points of a grid for one matrix (out, in): ``scale · level − offset``.

    Attributes:
        levels: the possible levels (levels,), ascending.
        scales: the scale of each group of columns of a row (out, groups). It is not 0 if levels are
            consecutive integers. If it is below 0, points descend.
        offsets: the offset of each group (out, groups); None for no offsets.
        columns: the number of columns of a group; the last group of a row may have fewer.
        dtype: the dtype in which points are stored: a product is rounded to it.
    """

    levels: Tensor
    scales: Tensor
    columns: int
    offsets: Tensor | None = None
    dtype: torch.dtype = torch.float32

    @cached_property
    def _first(self) -> float:
        return float(self.levels[0])

    @cached_property
    def _is_uniform(self) -> bool:
        """True if levels are consecutive integers, so that rounding needs no search."""
        return bool((self.levels.diff() == 1).all())

    @cached_property
    def _scales(self) -> tuple[Tensor, ...]:
        """The scales (out,) of each group."""
        return self.scales.T.contiguous().unbind()

    @cached_property
    def _offsets(self) -> tuple[Tensor, ...] | None:
        return None if self.offsets is None else self.offsets.T.contiguous().unbind()

    @cached_property
    def _middles(self) -> Tensor:
        return (self.levels[1:] + self.levels[:-1]) / 2

    def rounded(self, weight: Tensor) -> Tensor:
        """The nearest points (out, in) of all weights of the matrix (out, in)."""
        width = weight.shape[1]
        scales = self.scales.repeat_interleave(self.columns, 1)[:, :width]
        offsets = None
        if self.offsets is not None:
            offsets = self.offsets.repeat_interleave(self.columns, 1)[:, :width]
        ratios = (weight if offsets is None else weight + offsets) / scales
        if self._is_uniform:
            levels = ratios.round_().clamp_(self._first, self._first + len(self.levels) - 1)
        else:
            levels = self.levels[torch.bucketize(ratios, self._middles)]
        points = levels * scales
        return points if offsets is None else points - offsets

    def nearest(self, values: Tensor, column: int) -> Tensor:
        """The indices (out,) of the levels of the points nearest to the values of a column."""
        group = column // self.columns
        if self._offsets is not None:
            values = values + self._offsets[group]
        ratios = values / self._scales[group]
        if self._is_uniform:
            last = self._first + len(self.levels) - 1
            return ratios.round_().clamp_(self._first, last).sub_(self._first)
        return torch.bucketize(ratios, self._middles).to(values.dtype)

    def points(self, indices: Tensor, column: int) -> Tensor:
        """The points (out,) of a column with these indices of levels, in fp32."""
        group = column // self.columns
        levels = indices + self._first if self._is_uniform else self.levels[indices.long()]
        points = levels * self._scales[group]
        if self._offsets is not None:
            points = points - self._offsets[group]
        return points if self.dtype == torch.float32 else points.to(self.dtype).float()


class Grid(ABC):
    """The points to which the kept weights of a matrix are rounded.

    A grid is a frozen dataclass.

    Attributes:
        holds_zero: True if 0 is a point of each group, so that a pattern of zeros fits.
    """

    holds_zero: ClassVar[bool] = True

    @property
    @abstractmethod
    def name(self) -> str:
        """The name in reports and messages, such as ``int4``."""

    @abstractmethod
    def points(self, weight: Tensor, importance: Tensor, dtype: torch.dtype) -> Points:
        """The points for a matrix: its scales and offsets are chosen.

        Args:
            weight: the weights (out, in) in fp32, with zeros where they are pruned.
            importance: the weight of the squared error of each column (in,).
            dtype: the dtype in which scales and products are stored.
        """

    def encoded(self, points: Points, indices: Tensor) -> Tensor | None:
        """The bytes of each row (out, bytes) in a file, in uint8.

        None if the file is written from the values.

        Args:
            points: the result of `points`.
            indices: the indices of the levels (out, in).
        """
        return None


@dataclass(frozen=True)
class IntegerGrid(Grid):
    """Integers around 0, with a scale for each group of columns of a row.

    Args:
        bits: 8 or 4.
        group: the number of columns that share a scale, or ``"row"`` for all.
    """

    bits: int
    group: ScaleGroup = 128

    @property
    def name(self) -> str:
        """``int8`` or ``int4``."""
        return f"int{self.bits}"

    def columns(self, width: int) -> int:
        """The number of columns that share a scale in a weight of ``width`` columns.

        It is at most the width, rounded up to a multiple of `COLUMNS`.
        """
        padded = max(1, math.ceil(width / COLUMNS)) * COLUMNS
        return padded if self.group == "row" else min(self.group, padded)

    @property
    def most(self) -> int:
        """The largest integer."""
        return int(2 ** (self.bits - 1)) - 1

    def points(self, weight: Tensor, importance: Tensor, dtype: torch.dtype) -> Points:
        """See `Grid.points`; the scales are those of `scales_of`."""
        levels = torch.arange(-self.most, self.most + 1, device=weight.device).to(weight.dtype)
        scales = scales_of(weight, importance, self, dtype)
        return Points(levels, scales, self.columns(weight.shape[1]), dtype=dtype)


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
