"""Scales and offsets that are integers times a unit of their super-block.

Shapes are those of `scale_search`; units are (super-blocks, rows). The integers and the units are
searched for the exact error: a point is what llama.cpp decodes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from apt_plugins.gguf_files.scale_search import (
    LEAST,
    Levels,
    Weights,
    fitted_pairs,
    fitted_scales,
    quotient,
    to_half,
    to_half_above_0,
    where,
)


@dataclass(frozen=True)
class Shared:
    """Integers of groups, and their unit for each super-block.

    Attributes:
        unit: the unit (super-blocks, rows), a number of fp16 in fp32.
        integers: the integers (groups, rows) in fp32.
    """

    unit: Tensor
    integers: Tensor

    @property
    def values(self) -> Tensor:
        """The products (groups, rows)."""
        return spread(self.unit, self.integers) * self.integers


def spread(units: Tensor, like: Tensor) -> Tensor:
    """Values of super-blocks (super-blocks, rows) for each of their groups (groups, rows)."""
    return units.repeat_interleave(len(like) // len(units), 0)


@dataclass(frozen=True)
class Integers:
    """The integers of scales or of offsets in a type.

    Attributes:
        first: the lowest.
        last: the highest.
        zero: True if 0 is used.
    """

    first: int
    last: int
    zero: bool = True

    @property
    def ends(self) -> list[int]:
        """Integers for the value of the largest magnitude: the upper half of each sign."""
        low = range(self.first, self.first // 2, max(1, -self.first // 32))
        return [
            *(low if self.first < 0 else ()),
            *range(self.last, self.last // 2, -max(1, self.last // 63)),
        ]

    def nearest(self, ratios: Tensor) -> Tensor:
        """The nearest integers."""
        nearest = ratios.round().clamp_(self.first, self.last)
        return nearest if self.zero else torch.where(nearest == 0, 1.0, nearest)

    def fitted(self, values: Tensor, curvature: Tensor, blocks: int) -> Shared:
        """Values (groups, rows) as integers times a unit.

        Args:
            values: the values.
            curvature: the weight of the squared error of each value (groups, rows).
            blocks: the number of super-blocks.
        """
        parts = values.unflatten(0, (blocks, -1))
        extreme = parts.gather(1, parts.abs().argmax(1, keepdim=True))[:, 0]
        best = [torch.full_like(extreme, math.inf), extreme]
        for end in self.ends:
            unit = to_half_above_0(extreme / end)
            for _ in range(2):
                wide = spread(unit, values)
                integers = self.nearest(values / wide)
                error = _summed((integers * wide - values).square_().mul_(curvature), blocks)
                best = where(error < best[0], (error, unit), best)
                weighted = integers * curvature
                unit = quotient(
                    _summed(weighted * values, blocks), _summed(weighted * integers, blocks)
                )
                unit = to_half_above_0(unit)
        return Shared(best[1], self.nearest(values / spread(best[1], values)))


def _summed(values: Tensor, blocks: int) -> Tensor:
    """Sums over the groups of each super-block (super-blocks, rows)."""
    return values.unflatten(0, (blocks, -1)).sum(1)


def shared_scales(
    weights: Weights,
    levels: Levels,
    integers: Integers,
    blocks: int,
    ends: Sequence[float],
    changes: Sequence[int],
) -> Shared:
    """The scales of groups.

    Args:
        weights: the weights.
        levels: the levels.
        integers: the integers of scales.
        blocks: the number of super-blocks.
        ends: the ratios to try, see `fitted_scales`.
        changes: the largest changes of an integer in each round of the search.
    """
    scales, curvature = fitted_scales(weights, levels, ends)
    shared = integers.fitted(scales, curvature, blocks)
    unit, best = shared.unit, [weights.error(levels, shared.values), shared.integers]
    for most in changes:
        start, wide = best[1], spread(unit, best[1])
        for change in (*range(-most, 0), *range(1, most + 1)):
            tried = integers.nearest(start + change)
            best = where(
                (error := weights.error(levels, wide * tried)) < best[0], (error, tried), best
            )
        tried_unit = _best_unit(weights, levels, wide, best[1], blocks)
        error = weights.error(levels, spread(tried_unit, wide) * best[1])
        better = _summed(error, blocks) < _summed(best[0], blocks)
        unit = torch.where(better, tried_unit, unit)
        best[0] = torch.where(spread(better, wide), error, best[0])
    return Shared(unit, best[1])


def _best_unit(
    weights: Weights, levels: Levels, wide: Tensor, integers: Tensor, blocks: int
) -> Tensor:
    """The best unit for the levels that are nearest with the present unit."""
    nearest = weights.nearest(levels, wide * integers).mul_(integers)
    weighted = nearest * weights.weighting
    products, squares = (weighted * weights.values).sum(0), weighted.mul_(nearest).sum(0)
    return to_half_above_0(quotient(_summed(products, blocks), _summed(squares, blocks)))


def shared_pairs(
    weights: Weights,
    top: int,
    most: int,
    blocks: int,
    candidates: Sequence[tuple[float, float]],
    changes: Sequence[int],
) -> tuple[Shared, Shared]:
    """The scales and the offsets of groups, for levels from 0 to ``top``.

    Args:
        weights: the weights.
        top: the highest level.
        most: the highest integer of scales and offsets.
        blocks: the number of super-blocks.
        candidates: the pairs to try, see `fitted_pairs`.
        changes: the largest changes of an integer in each round of the search.
    """
    levels, kinds = Levels.between(0, top), (Integers(1, most), Integers(0, most))
    scale, offset = _first_pairs(weights, levels, kinds, blocks, candidates)
    units = [scale.unit, offset.unit]
    best = [weights.error(levels, scale.values, offset.values), scale.integers, offset.integers]
    for change in changes:
        wide = [spread(unit, best[0]) for unit in units]
        start = best[1:]
        for step in product(range(-change, change + 1), repeat=2):
            tried = [
                kind.nearest(old + by) for kind, old, by in zip(kinds, start, step, strict=True)
            ]
            error = weights.error(levels, wide[0] * tried[0], wide[1] * tried[1])
            best = where(error < best[0], (error, *tried), best)
        tried_units = _best_units(weights, levels, wide, best[1:], blocks)
        wide = [spread(unit, best[0]) for unit in tried_units]
        error = weights.error(levels, wide[0] * best[1], wide[1] * best[2])
        better = _summed(error, blocks) < _summed(best[0], blocks)
        units = where(better, tried_units, units)
        best[0] = torch.where(spread(better, error), error, best[0])
    return Shared(units[0], best[1]), Shared(units[1], best[2])


def _first_pairs(
    weights: Weights,
    levels: Levels,
    kinds: tuple[Integers, Integers],
    blocks: int,
    candidates: Sequence[tuple[float, float]],
) -> tuple[Shared, Shared]:
    """Scales that are near the best of each group, and the best offsets for these scales."""
    scales, offsets = fitted_pairs(weights, levels.last, candidates, signed=False)
    total = weights.weighting.sum(0)
    nearest = weights.nearest(levels, scales, offsets)
    weighted = nearest * weights.weighting
    curvature = (weighted * nearest).sum(0) - weighted.sum(0).square() / total
    scale = kinds[0].fitted(scales, curvature, blocks)
    nearest = weights.nearest(levels, scale.values, offsets).mul_(scale.values)
    excess = nearest.sub_(weights.values).mul_(weights.weighting).sum(0) / total
    return scale, kinds[1].fitted(excess.clamp_min_(0), total.expand_as(excess), blocks)


def _best_units(
    weights: Weights,
    levels: Levels,
    wide: Sequence[Tensor],
    integers: Sequence[Tensor],
    blocks: int,
) -> list[Tensor]:
    """The best units for the levels that are nearest with the present units."""
    factors, lows = integers
    nearest = weights.nearest(levels, wide[0] * factors, wide[1] * lows).mul_(factors)
    weighted = nearest * weights.weighting
    # The normal equations of ``unit · nearest − minimum · lows``.
    ab = -_summed(weighted.sum(0) * lows, blocks)
    ax = _summed((weighted * weights.values).sum(0), blocks)
    aa = _summed(weighted.mul_(nearest).sum(0), blocks)
    bb = _summed(lows.square() * weights.weighting.sum(0), blocks)
    bx = -_summed((weights.values * weights.weighting).sum(0) * lows, blocks)
    determinant = aa * bb - ab * ab
    solvable = determinant > 1e-6 * aa * bb
    unit, minimum = where(
        solvable,
        ((ax * bb - bx * ab) / determinant, (bx * aa - ax * ab) / determinant),
        (quotient(ax, aa), torch.zeros_like(ax)),
    )
    return [to_half(unit).clamp_min(LEAST), to_half(minimum).clamp_min(0)]
