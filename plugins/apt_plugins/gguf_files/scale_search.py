"""The scales and offsets of groups of weights with the least weighted squared error.

Tensors of weights have the shape (columns of a group, groups, rows): a group is summed over the
first dimension, so that all other dimensions are contiguous. Weightings are (columns of a group,
groups, 1). Scales and offsets are (groups, rows).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = 2.0**-24
"""The least number above 0 in fp16."""

MOST = 65504.0
"""The largest number in fp16."""


@dataclass(frozen=True)
class Levels:
    """The levels of a grid, ascending.

    Attributes:
        values: the levels.
    """

    values: tuple[int, ...]

    @property
    def first(self) -> int:
        """The lowest level."""
        return self.values[0]

    @property
    def last(self) -> int:
        """The highest level."""
        return self.values[-1]

    @property
    def is_uniform(self) -> bool:
        """True if levels are consecutive integers."""
        return len(self.values) == self.last - self.first + 1

    def tensor(self, like: Tensor) -> Tensor:
        """The levels as a tensor on the device of another."""
        return torch.tensor(self.values, dtype=torch.float32, device=like.device)

    def nearest_(self, ratios: Tensor) -> Tensor:
        """The level nearest to each number; the numbers are overwritten."""
        if self.is_uniform:
            return ratios.round_().clamp_(self.first, self.last)
        # Middles between levels are multiples of 0.5: the nearest level is the same from one
        # multiple to the next, and a table has it.
        steps = ratios.mul_(2).floor_().clamp_(2 * self.first, 2 * self.last).sub_(2 * self.first)
        return self._table(ratios)[steps.int()]

    def _table(self, like: Tensor) -> Tensor:
        levels = self.tensor(like)
        points = torch.arange(2 * self.first, 2 * self.last + 1, device=like.device) / 2 + 0.25
        return levels[torch.bucketize(points, (levels[1:] + levels[:-1]) / 2)]


def to_half(values: Tensor) -> Tensor:
    """Values rounded to fp16, in fp32, with at most the largest number in fp16."""
    return values.clamp(-MOST, MOST).half().float()


def not_zero(values: Tensor) -> Tensor:
    """Values of fp16 with the least positive number in place of 0."""
    return torch.where(values == 0, LEAST, values)


def inverse(values: Tensor) -> Tensor:
    """``1 / values``, and 0 for 0."""
    return torch.where(values == 0, 0.0, 1 / values)


@dataclass(frozen=True)
class Weights:
    """Weights of groups, and the weight of the squared error of each column.

    Attributes:
        values: the weights (columns of a group, groups, rows).
        weighting: the weights of errors (columns of a group, groups, 1).
    """

    values: Tensor
    weighting: Tensor

    def error(self, scales: Tensor, levels: Levels, offsets: Tensor | None = None) -> Tensor:
        """The weighted squared error of each group (groups, rows)."""
        shifted = self.values if offsets is None else self.values + offsets
        points = levels.nearest_(shifted * inverse(scales)).mul_(scales)
        return points.sub_(shifted).square_().mul_(self.weighting).sum(0)

    def nearest(self, scales: Tensor, levels: Levels, offsets: Tensor | None = None) -> Tensor:
        """The nearest levels (columns of a group, groups, rows)."""
        shifted = self.values if offsets is None else self.values + offsets
        return levels.nearest_(shifted * inverse(scales))


def fitted_scales(weights: Weights, levels: Levels, ends: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The scale of each group, and the sum of the squares of its levels.

    For each candidate, the weight of the largest magnitude has a given ratio to the scale. Each
    weight has the nearest level; then the scale is the best for these levels.

    Args:
        weights: the weights.
        levels: the levels.
        ends: the ratios to try; a negative ratio flips the sign of the scale.
    """
    values, weighting = weights.values, weights.weighting
    extreme = values.gather(0, values.abs().argmax(0, keepdim=True))[0]
    weighted = values * weighting
    best, scales, curvature = (torch.zeros_like(extreme) for _ in range(3))
    factors = inverse(extreme)
    for end in ends:
        nearest = levels.nearest_(values * (factors * end))
        product = (nearest * weighted).sum(0)
        square = nearest.square_().mul_(weighting).sum(0)
        gain = product.square() / square.clamp_min(1e-30)
        better = gain > best
        best = torch.where(better, gain, best)
        scales = torch.where(better, product / square.clamp_min(1e-30), scales)
        curvature = torch.where(better, square, curvature)
    return scales, curvature


def refitted(weights: Weights, scales: Tensor, levels: Levels) -> Tensor:
    """The best scale for the levels that are nearest with the given scales."""
    nearest = weights.nearest(scales, levels)
    product = (nearest * weights.values).mul_(weights.weighting).sum(0)
    square = nearest.square_().mul_(weights.weighting).sum(0)
    return product / square.clamp_min(1e-30)


def half_scales(
    weights: Weights, levels: Levels, ends: Sequence[float], exact: Sequence[float] = ()
) -> Tensor:
    """The scale of each group in fp16 (see `fitted_scales`).

    Args:
        weights: the weights.
        levels: the levels.
        ends: the ratios to try.
        exact: ratios to try without a fit.
    """
    extreme = weights.values.gather(0, weights.values.abs().argmax(0, keepdim=True))[0]
    fitted, _ = fitted_scales(weights, levels, ends)
    keep = not_zero if 0 in levels.values else lambda scales: scales
    best = keep(to_half(fitted))
    error = weights.error(best, levels)
    again = refitted(weights, best, levels)
    for scales in (again, *(extreme / end for end in exact)):
        tried = keep(to_half(scales))
        best, error = _better(best, error, tried, weights.error(tried, levels))
    return best


def _better(best: Tensor, error: Tensor, tried: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    better = new < error
    return torch.where(better, tried, best), torch.where(better, new, error)


def fitted_pairs(
    weights: Weights, top: int, steps: Sequence[float], signed: bool
) -> tuple[Tensor, Tensor]:
    """The scale and the offset of each group, for levels from 0 to ``top``.

    Candidates as in llama.cpp: the range of the weights has ``top`` plus a given number of steps.
    Each weight has the nearest level; then scale and offset are the best for these levels.

    Args:
        weights: the weights.
        top: the highest level.
        steps: the numbers of steps to try beyond ``top``.
        signed: True if offsets may be below 0.
    """
    values, weighting = weights.values, weights.weighting
    levels = Levels(tuple(range(top + 1)))
    low, high = values.amin(0), values.amax(0)
    if not signed:
        low = low.clamp_max(0)
    total = weighting.sum(0)
    weighted = values * weighting
    mean = weighted.sum(0) / total
    scales, offsets = (high - low).clamp_min(0) / top, -low
    best = weights.error(scales, levels, offsets)
    for step in steps:
        inverse_scale = inverse(high - low) * (top + step)
        nearest = levels.nearest_((values - low) * inverse_scale)
        scale, offset = _best_pair(nearest, weights, weighted, mean, total, signed)
        tried = weights.error(scale, levels, offset)
        better = tried < best
        best = torch.where(better, tried, best)
        scales, offsets = torch.where(better, scale, scales), torch.where(better, offset, offsets)
    return scales, offsets


def _best_pair(
    nearest: Tensor, weights: Weights, weighted: Tensor, mean: Tensor, total: Tensor, signed: bool
) -> tuple[Tensor, Tensor]:
    """The best scale and offset for given levels."""
    product = (nearest * weighted).sum(0)
    level_sums = nearest * weights.weighting
    square = (level_sums * nearest).sum(0)
    level_mean = level_sums.sum(0) / total
    variance = square - level_mean.square() * total
    scale = (product - level_mean * mean * total) / variance.clamp_min(1e-30)
    scale = torch.where(variance > 1e-6 * square, scale, 0.0)
    offset = level_mean * scale - mean
    if not signed:
        through_zero = product / square.clamp_min(1e-30)
        scale = torch.where(offset < 0, through_zero, scale)
        offset = offset.clamp_min(0)
    return scale.clamp_min(0), offset


def half_pairs(weights: Weights, top: int, steps: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The scale and the offset of each group in fp16 (see `fitted_pairs`)."""
    levels = Levels(tuple(range(top + 1)))
    scales, offsets = fitted_pairs(weights, top, steps, signed=True)
    low, high = weights.values.amin(0), weights.values.amax(0)
    best = None
    for scale, offset in ((scales, offsets), ((high - low) / top, -low)):
        scale, offset = not_zero(to_half(scale)), to_half(offset)
        error = weights.error(scale, levels, offset)
        if best is None:
            best = scale, offset, error
        better = error < best[2]
        best = tuple(
            torch.where(better, new, old)
            for new, old in zip((scale, offset, error), best, strict=True)
        )
    return best[0], best[1]


@dataclass(frozen=True)
class Shared:
    """Integers of groups, and their unit for each super-block.

    Attributes:
        unit: the unit in fp16 (super-blocks, rows).
        integers: the integers (groups, rows).
    """

    unit: Tensor
    integers: Tensor

    @property
    def values(self) -> Tensor:
        """The products (groups, rows)."""
        return spread(self.unit, len(self.integers)) * self.integers


def spread(units: Tensor, groups: int) -> Tensor:
    """The units of super-blocks (super-blocks, rows) for each of their groups (groups, rows)."""
    return units.repeat_interleave(groups // len(units), 0)


def _summed(values: Tensor, blocks: int) -> Tensor:
    """Sums over the groups of each super-block (super-blocks, rows)."""
    return values.unflatten(0, (blocks, -1)).sum(1)


@dataclass(frozen=True)
class Integers:
    """The integers that super-blocks have for scales or offsets.

    Attributes:
        first: the lowest.
        last: the highest.
        zero: True if 0 is used.
    """

    first: int
    last: int
    zero: bool = True

    def nearest(self, ratios: Tensor) -> Tensor:
        """The nearest integers."""
        nearest = ratios.round().clamp(self.first, self.last)
        return nearest if self.zero else torch.where(nearest == 0, 1.0, nearest)

    def shared(
        self, values: Tensor, curvature: Tensor, blocks: int, ends: Sequence[float]
    ) -> Shared:
        """Values (groups, rows) as integers times a unit.

        Args:
            values: the values.
            curvature: the weight of the squared error of each value.
            blocks: the number of super-blocks.
            ends: ratios of the largest value to the unit that are tried.
        """
        parts = values.unflatten(0, (blocks, -1))
        extreme = parts.gather(1, parts.abs().argmax(1, keepdim=True))[:, 0]
        best = error = None
        for end in ends:
            unit = not_zero(to_half(extreme / end))
            for _ in range(2):
                wide = spread(unit, len(values))
                integers = self.nearest(values / wide)
                new = _summed((integers * wide - values).square_().mul_(curvature), blocks)
                if best is None:
                    best, error = unit, new
                best, error = _better(best, error, unit, new)
                product = _summed(integers * values * curvature, blocks)
                square = _summed(integers.square() * curvature, blocks)
                unit = not_zero(to_half(product / square.clamp_min(1e-30)))
        return Shared(best, self.nearest(values / spread(best, len(values))))


def shared_scales(
    weights: Weights,
    levels: Levels,
    integers: Integers,
    blocks: int,
    ends: Sequence[float],
    unit_ends: Sequence[float],
) -> Shared:
    """The scales of groups, which are integers times a unit of their super-block."""
    scales, curvature = fitted_scales(weights, levels, ends)
    shared = integers.shared(scales, curvature, blocks, unit_ends)
    return _descended(weights, levels, integers, blocks, shared)


def _descended(
    weights: Weights, levels: Levels, integers: Integers, blocks: int, shared: Shared
) -> Shared:
    """Integers that are changed by 1, and units that are fitted again, while the error falls."""
    unit, best = shared.unit, shared.integers
    error = weights.error(shared.values, levels)
    for _ in range(2):
        wide = spread(unit, len(best))
        start = best
        for change in (-1, 1):
            tried = integers.nearest(start + change)
            best, error = _better(best, error, tried, weights.error(wide * tried, levels))
        nearest = weights.nearest(wide * best, levels).mul_(best)
        product = _summed((nearest * weights.values).mul_(weights.weighting).sum(0), blocks)
        square = _summed(nearest.square_().mul_(weights.weighting).sum(0), blocks)
        tried_unit = not_zero(to_half(product / square.clamp_min(1e-30)))
        new = weights.error(spread(tried_unit, len(best)) * best, levels)
        better = _summed(new, blocks) < _summed(error, blocks)
        unit = torch.where(better, tried_unit, unit)
        error = torch.where(spread(better, len(best)), new, error)
    return Shared(unit, best)


def shared_pairs(
    weights: Weights,
    top: int,
    most: int,
    blocks: int,
    steps: Sequence[float],
    unit_ends: Sequence[float],
) -> tuple[Shared, Shared]:
    """The scales and offsets of groups, as integers times units of their super-block."""
    levels = Levels(tuple(range(top + 1)))
    of_scales, of_offsets = Integers(1, most), Integers(0, most)
    scales, offsets = fitted_pairs(weights, top, steps, signed=False)
    total = weights.weighting.sum(0)
    nearest = weights.nearest(scales, levels, offsets)
    level_sums = nearest * weights.weighting
    curvature = (level_sums * nearest).sum(0) - level_sums.sum(0).square() / total
    scale = of_scales.shared(scales, curvature, blocks, unit_ends)
    nearest = weights.nearest(scale.values, levels, offsets)
    rest = (nearest.mul_(scale.values).sub_(weights.values)).mul_(weights.weighting).sum(0)
    offset = of_offsets.shared(
        (rest / total).clamp_min_(0), total.expand_as(rest), blocks, unit_ends
    )
    return _descended_pairs(weights, levels, (of_scales, of_offsets), blocks, (scale, offset))


def _descended_pairs(
    weights: Weights,
    levels: Levels,
    kinds: tuple[Integers, Integers],
    blocks: int,
    shared: tuple[Shared, Shared],
) -> tuple[Shared, Shared]:
    """Integers that are changed by 1, and units that are fitted again, while the error falls."""
    (unit, minimum), (best, lows) = ((each.unit for each in shared), (s.integers for s in shared))
    groups = len(best)
    error = weights.error(shared[0].values, levels, shared[1].values)
    for _ in range(2):
        wide, wide_minimum = spread(unit, groups), spread(minimum, groups)
        start, start_lows = best, lows
        for change, change_low in ((-1, 0), (1, 0), (0, -1), (0, 1), (1, 1), (-1, -1)):
            tried = kinds[0].nearest(start + change)
            tried_lows = kinds[1].nearest(start_lows + change_low)
            new = weights.error(wide * tried, levels, wide_minimum * tried_lows)
            better = new < error
            best, lows = torch.where(better, tried, best), torch.where(better, tried_lows, lows)
            error = torch.where(better, new, error)
        units = _best_units(weights, levels, blocks, (wide, best), (wide_minimum, lows))
        new = weights.error(
            spread(units[0], groups) * best, levels, spread(units[1], groups) * lows
        )
        better = _summed(new, blocks) < _summed(error, blocks)
        unit = torch.where(better, units[0], unit)
        minimum = torch.where(better, units[1], minimum)
        error = torch.where(spread(better, groups), new, error)
    return Shared(unit, best), Shared(minimum, lows)


def _best_units(
    weights: Weights,
    levels: Levels,
    blocks: int,
    scale: tuple[Tensor, Tensor],
    offset: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """The best units of scales and offsets for given levels and integers."""
    (unit, best), (minimum, lows) = scale, offset
    nearest = weights.nearest(unit * best, levels, minimum * lows).mul_(best)
    sums = nearest * weights.weighting

    def total(values: Tensor) -> Tensor:
        return _summed(values.sum(0), blocks)

    aa, bb = total(sums * nearest), total(lows.square() * weights.weighting)
    ab, ax = -total(sums * lows), total(sums * weights.values)
    bx = -total(weights.values * weights.weighting * lows)
    determinant = aa * bb - ab * ab
    valid = determinant > 1e-6 * aa * bb
    safe = torch.where(valid, determinant, 1.0)
    first = torch.where(valid, (ax * bb - bx * ab) / safe, ax / aa.clamp_min(1e-30))
    second = torch.where(valid, (bx * aa - ax * ab) / safe, 0.0)
    return to_half(first).clamp_min(LEAST), to_half(second).clamp_min(0)


def tiles(
    weight: Tensor, importance: Tensor, group: int, block: int, size: int
) -> "list[tuple[slice, slice]]":
    """Slices of rows and columns with about ``size`` weights, with whole blocks."""
    rows, columns = weight.shape
    width = min(columns, max(1, 1024 // block) * block)
    height = max(1, size // width)
    return [
        (slice(row, min(row + height, rows)), slice(column, min(column + width, columns)))
        for column in range(0, columns, width)
        for row in range(0, rows, height)
    ]


Search = Callable[[Weights], tuple[Tensor, ...]]


def searched(
    weight: Tensor, importance: Tensor, group: int, block: int, search: Search
) -> list[Tensor]:
    """The results of a search for all groups of a matrix, each (out, groups or blocks).

    Args:
        weight: the weights (out, in).
        importance: the weight of the squared error of each column (in,).
        group: the columns of a group.
        block: the columns of a super-block.
        search: returns tensors (groups or super-blocks, rows) for some of the weights.
    """
    rows, columns = weight.shape
    mean = importance.mean()
    even = importance / mean if math.isfinite(mean) and mean > 0 else torch.ones_like(importance)
    weighting = even.clamp_min(1e-6)  # a group without importance has an error too
    results: list[Tensor] = []
    for row, column in tiles(weight, importance, group, block, 2**17):
        part = weight[row, column].float()
        values = part.unflatten(1, (-1, group)).permute(2, 1, 0).contiguous()
        own = weighting[column].view(-1, group).t().unsqueeze(2).contiguous()
        found = search(Weights(values, own))
        width = columns * len(values[0]) // part.shape[1]
        for place, result in enumerate(found):
            if len(results) <= place:
                whole = width * len(result) // len(values[0])
                results.append(result.new_empty(rows, whole))
            step = part.shape[1] // len(result)
            first = column.start // step
            results[place][row, first : first + len(result)] = result.t()
    return results
