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
        """Integers that are tried for the value of the largest magnitude, of both signs."""
        low = range(self.first, self.first // 2, max(1, -self.first // 32))
        high = range(self.last, self.last // 2, -max(1, self.last // 63))
        return [*(low if self.first < 0 else ()), *high]

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
        parts = values.view(blocks, -1, values.shape[1])
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
                products, squares = weighted * values, weighted * integers
                unit = to_half_above_0(
                    quotient(_summed(products, blocks), _summed(squares, blocks))
                )
        return Shared(best[1], self.nearest(values / spread(best[1], values)))


def _summed(values: Tensor, blocks: int) -> Tensor:
    """Sums over the groups of each super-block (super-blocks, rows)."""
    return values.view(blocks, -1, values.shape[1]).sum(1)


def shared_scales(
    weights: Weights,
    levels: Levels,
    integers: Integers,
    blocks: int,
    ends: Sequence[float],
    changes: Sequence[int],
) -> list[Shared]:
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
    first = integers.fitted(scales, curvature, blocks)
    return _descended(weights, levels, [integers], [first], changes)


def shared_pairs(
    weights: Weights,
    top: int,
    most: int,
    blocks: int,
    candidates: Sequence[tuple[float, float]],
    changes: Sequence[int],
) -> list[Shared]:
    """The scales and the offsets of groups, for levels from 0 to ``top``.

    Args:
        weights: the weights.
        top: the highest level.
        most: the highest integer of scales and offsets.
        blocks: the number of super-blocks.
        candidates: the pairs to try, see `fitted_pairs`.
        changes: the largest changes of an integer in each round of the search.
    """
    levels, kinds = Levels.between(0, top), [Integers(1, most), Integers(0, most)]
    scales, offsets = fitted_pairs(weights, top, candidates, signed=False)
    total = weights.weighting.sum(0)
    nearest = weights.nearest(levels, scales, offsets)
    weighted = nearest * weights.weighting
    curvature = (weighted * nearest).sum(0) - weighted.sum(0).square() / total
    scale = kinds[0].fitted(scales, curvature, blocks)
    nearest = weights.nearest(levels, scale.values, offsets).mul_(scale.values)
    excess = nearest.sub_(weights.values).mul_(weights.weighting).sum(0) / total
    offset = kinds[1].fitted(excess.clamp_min_(0), total.expand_as(excess), blocks)
    return _descended(weights, levels, kinds, [scale, offset], changes)


def _descended(
    weights: Weights,
    levels: Levels,
    kinds: Sequence[Integers],
    shared: Sequence[Shared],
    changes: Sequence[int],
) -> list[Shared]:
    """Other integers for each group, and other units, while they decrease the error.

    Args:
        weights: the weights.
        levels: the levels.
        kinds: the integers of scales, and those of offsets if there are offsets.
        shared: the first scales, and the first offsets.
        changes: the largest changes of an integer in each round.
    """
    units, blocks = [each.unit for each in shared], len(shared[0].unit)
    best = [each.integers for each in shared]
    error = weights.error(levels, *(each.values for each in shared))
    for change in changes:
        wide, start = [spread(unit, error) for unit in units], best
        for steps in product(range(-change, change + 1), repeat=len(kinds)):
            tried = [
                kind.nearest(old + step)
                for kind, old, step in zip(kinds, start, steps, strict=True)
            ]
            new = weights.error(levels, *_products(wide, tried))
            error, *best = where(new < error, (new, *tried), (error, *best))
        tried_units = _best_units(weights, levels, wide, best, blocks)
        new = weights.error(levels, *_products([spread(unit, error) for unit in tried_units], best))
        better = _summed(new, blocks) < _summed(error, blocks)
        units = where(better, tried_units, units)
        error = torch.where(spread(better, error), new, error)
    return [Shared(unit, integers) for unit, integers in zip(units, best, strict=True)]


def _products(units: Sequence[Tensor], integers: Sequence[Tensor]) -> list[Tensor]:
    return [unit * integer for unit, integer in zip(units, integers, strict=True)]


def _best_units(
    weights: Weights,
    levels: Levels,
    wide: Sequence[Tensor],
    integers: Sequence[Tensor],
    blocks: int,
) -> list[Tensor]:
    """The best units for the levels that are nearest with the present units.

    They solve the normal equations of ``unit · a − minimum · b``, where ``a`` is the level times
    the integer of the scale, and ``b`` is the integer of the offset.
    """
    values, weighting = weights.values, weights.weighting
    a = weights.nearest(levels, *_products(wide, integers)).mul_(integers[0])
    weighted = a * weighting
    sums, ax = weighted.sum(0), _summed((weighted * values).sum(0), blocks)
    aa = _summed(weighted.mul_(a).sum(0), blocks)
    if len(integers) == 1:
        return [to_half_above_0(quotient(ax, aa))]
    b = integers[1]
    ab, bx = -_summed(sums * b, blocks), -_summed((values * weighting).sum(0) * b, blocks)
    bb = _summed(b.square() * weighting.sum(0), blocks)
    determinant = aa * bb - ab * ab
    unit, minimum = where(
        determinant > 1e-6 * aa * bb,
        ((ax * bb - bx * ab) / determinant, (bx * aa - ax * ab) / determinant),
        (quotient(ax, aa), torch.zeros_like(ax)),
    )
    return [to_half(unit).clamp_min(LEAST), to_half(minimum).clamp_min(0)]
