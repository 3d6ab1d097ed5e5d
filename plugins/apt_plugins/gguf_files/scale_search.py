"""The scales and offsets of groups of weights with the least weighted squared error.

Tensors of weights have the shape (columns of a group, groups, rows): sums over a group are over the
first dimension, so that the numbers that are added at the same time lie side by side. Scales and
offsets are (groups, rows).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

LEAST = 2.0**-24
"""The least number of fp16 above 0."""

_MOST = 65504.0  # the largest number of fp16
_TINY = 1e-30  # in place of a divisor 0
_TILE = 2**17  # weights whose scales are searched at a time: they stay in the cache
_TILE_COLUMNS = 1024
_LEAST_WEIGHTING = 1e-6  # relative to the mean: a group without importance has an error too
_POLISHES = 2  # fits to the levels that are nearest with the best pair so far
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Levels:
    """The levels of a grid.

    Attributes:
        values: the levels, ascending.
    """

    values: tuple[int, ...]

    @classmethod
    def between(cls, first: int, last: int) -> "Levels":
        """All integers from the first to the last."""
        return cls(tuple(range(first, last + 1)))

    @property
    def first(self) -> int:
        """The lowest level."""
        return self.values[0]

    @property
    def last(self) -> int:
        """The highest level."""
        return self.values[-1]

    def tensor(self, device: torch.device) -> Tensor:
        """The levels in fp32."""
        return torch.tensor(self.values, dtype=torch.float32, device=device)

    def nearest_(self, ratios: Tensor) -> Tensor:
        """The level nearest to each number; the numbers are overwritten."""
        if len(self.values) == self.last - self.first + 1:
            return ratios.round_().clamp_(self.first, self.last)
        # The middles between levels are multiples of 0.5: the nearest level is the same from one
        # multiple to the next, and a table has it.
        steps = ratios.mul_(2).sub_(2 * self.first).clamp_(0, 2 * (self.last - self.first)).int()
        table = _nearest_levels(self, ratios.device)
        return table.index_select(0, steps.view(-1)).view_as(ratios)


@lru_cache
def _nearest_levels(levels: Levels, device: torch.device) -> Tensor:
    """The level nearest to the numbers between two multiples of 0.5, from the first level on."""
    values = levels.tensor(device)
    numbers = torch.arange(2 * levels.first, 2 * levels.last + 1, device=device) / 2 + 0.25
    return values[torch.bucketize(numbers, (values[1:] + values[:-1]) / 2)]


@dataclass(frozen=True)
class Weights:
    """Weights in groups, and the weights of their squared errors.

    Attributes:
        values: the weights (columns of a group, groups, rows).
        weighting: the weights of errors (columns of a group, groups, 1).
    """

    values: Tensor
    weighting: Tensor

    @property
    def extremes(self) -> Tensor:
        """The weight of the largest magnitude in each group (groups, rows)."""
        return self.values.gather(0, self.values.abs().argmax(0, keepdim=True))[0]

    def nearest(self, levels: Levels, scales: Tensor, offsets: Tensor | None = None) -> Tensor:
        """The levels of the nearest points (columns of a group, groups, rows)."""
        shifted = self.values if offsets is None else self.values + offsets
        return levels.nearest_(shifted * inverse(scales))

    def error(self, levels: Levels, scales: Tensor, offsets: Tensor | None = None) -> Tensor:
        """The weighted squared error of the nearest points, summed over each group."""
        shifted = self.values if offsets is None else self.values + offsets
        points = levels.nearest_(shifted * inverse(scales)).mul_(scales)
        return points.sub_(shifted).square_().mul_(self.weighting).sum(0)


def inverse(values: Tensor) -> Tensor:
    """``1 / values``, and 0 for 0."""
    return torch.where(values == 0, 0.0, 1 / values)


def quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, for a denominator that is not below 0; 0 / 0 is 0."""
    return numerator / denominator.clamp_min(_TINY)


def to_half(values: Tensor) -> Tensor:
    """Values rounded to finite numbers of fp16, in fp32."""
    return values.clamp(-_MOST, _MOST).half().float()


def to_half_above_0(values: Tensor) -> Tensor:
    """As `to_half`, with the least number above 0 in place of 0."""
    half = to_half(values)
    return torch.where(half == 0, LEAST, half)


def where(condition: Tensor, first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    """`torch.where` for several tensors."""
    return [torch.where(condition, a, b) for a, b in zip(first, second, strict=True)]


def fitted_scales(weights: Weights, levels: Levels, ends: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The scale of each group, and the weighted sum of the squares of its levels.

    For each candidate, the weight of the largest magnitude has a given ratio to the scale. Each
    weight has the nearest level; then the scale is the best for these levels.

    Args:
        weights: the weights.
        levels: the levels.
        ends: the ratios to try; a negative ratio reverses the order of the points.
    """
    factors = inverse(weights.extremes)
    weighted = weights.values * weights.weighting
    best = [torch.zeros_like(factors)] * 3
    for end in ends:
        nearest = levels.nearest_(weights.values * (factors * end))
        product = (nearest * weighted).sum(0)
        square = nearest.square_().mul_(weights.weighting).sum(0)
        scale = quotient(product, square)
        gain = scale * product
        best = where(gain > best[0], (gain, scale, square), best)
    return best[1], best[2]


def refitted(weights: Weights, levels: Levels, scales: Tensor) -> Tensor:
    """The best scales for the levels that are nearest with the given scales."""
    nearest = weights.nearest(levels, scales)
    product = (nearest * weights.values).mul_(weights.weighting).sum(0)
    return quotient(product, nearest.square_().mul_(weights.weighting).sum(0))


def half_scales(weights: Weights, levels: Levels, ends: Sequence[float]) -> Tensor:
    """The scale of each group in fp16 (see `fitted_scales`).

    A scale is 0 only if 0 is no level.
    """
    half = to_half_above_0 if 0 in levels.values else to_half
    fitted = half(fitted_scales(weights, levels, ends)[0])
    best = [weights.error(levels, fitted), fitted]
    for scales in (refitted(weights, levels, fitted), weights.extremes / levels.first):
        tried = half(scales)
        error = weights.error(levels, tried)
        best = where(error < best[0], (error, tried), best)
    return best[1]


def clips(first: float, last: float, count: int) -> list[tuple[float, float]]:
    """Candidates of `fitted_pairs`: how far weights are above and below the levels, in steps.

    The sums of both are from ``first`` to ``last``. The differences vary by the golden ratio.
    """
    sums = torch.linspace(first, last, count).tolist()
    below = [each / 2 + (place * _GOLDEN) % 1 - 0.5 for place, each in enumerate(sums)]
    return [(low, both - low) for low, both in zip(below, sums, strict=True)]


def fitted_pairs(
    weights: Weights, top: int, candidates: Sequence[tuple[float, float]], *, signed: bool
) -> tuple[Tensor, Tensor]:
    """The scale and the offset of each group, for levels from 0 to ``top``.

    For each candidate, the lowest and the highest weight lie by given steps beyond the levels. Each
    weight has the nearest level; then scale and offset are the best for these levels.

    Args:
        weights: the weights.
        top: the highest level.
        candidates: the steps below and above the levels.
        signed: True if offsets may be below 0.
    """
    fit = _PairFit.of(weights, signed)
    levels = Levels.between(0, top)
    low, high = weights.values.amin(0), weights.values.amax(0)
    if not signed:
        low = low.clamp_max(0)
    raised, factors = weights.values - low, inverse(high - low)
    best = [torch.full_like(low, -math.inf), torch.zeros_like(low), -low]
    for below, above in candidates:
        ratios = (raised * (factors * (top + below + above))).sub_(below)
        tried = fit.best(levels.nearest_(ratios))
        best = where(tried[0] > best[0], tried, best)
    for _ in range(_POLISHES):
        tried = fit.best(weights.nearest(levels, best[1], best[2]))
        best = where(tried[0] > best[0], tried, best)
    return best[1], best[2]


@dataclass(frozen=True)
class _PairFit:
    """The fit of scales and offsets to given levels.

    Attributes:
        weighting: the weights of errors (columns of a group, groups, 1).
        total: the sum of the weights of errors of each group (groups, 1).
        mean: the weighted mean of each group (groups, rows).
        deviations: the weights minus the mean, times the weights of errors.
        signed: True if offsets may be below 0.
    """

    weighting: Tensor
    total: Tensor
    mean: Tensor
    deviations: Tensor
    signed: bool

    @classmethod
    def of(cls, weights: Weights, signed: bool) -> "_PairFit":
        values, weighting = weights.values, weights.weighting
        total = weighting.sum(0)
        mean = (values * weighting).sum(0) / total
        return cls(weighting, total, mean, (values - mean).mul_(weighting), signed)

    def best(self, nearest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The decrease of the error, the scale and the offset; the levels are overwritten."""
        product = (nearest * self.deviations).sum(0)
        sums = nearest * self.weighting
        level_sum, square = sums.sum(0), sums.mul_(nearest).sum(0)
        variance = square - level_sum.square() / self.total
        scale = product / torch.where(variance > 1e-5 * square, variance, math.inf)
        gain = scale * product
        offset = level_sum / self.total * scale - self.mean
        if not self.signed:
            whole_product = product + self.mean * level_sum
            without = quotient(whole_product, square)
            other_gain = without * whole_product - self.mean.square() * self.total
            gain, scale = where(offset < 0, (other_gain, without), (gain, scale))
            offset = offset.clamp_min(0)
        return gain, scale.clamp_min(0), offset


def half_pairs(
    weights: Weights, top: int, candidates: Sequence[tuple[float, float]]
) -> tuple[Tensor, Tensor]:
    """The scale above 0 and the offset of each group in fp16 (see `fitted_pairs`)."""
    levels = Levels.between(0, top)
    low, high = weights.values.amin(0), weights.values.amax(0)
    best = [torch.full_like(low, math.inf), low, low]
    pairs = (fitted_pairs(weights, top, candidates, signed=True), ((high - low) / top, -low))
    for scale, offset in pairs:
        tried = to_half_above_0(scale), to_half(offset)
        error = weights.error(levels, *tried)
        best = where(error < best[0], (error, *tried), best)
    return best[1], best[2]


def searched(
    weight: Tensor,
    importance: Tensor,
    group: int,
    block: int,
    search: Callable[[Weights], Sequence[Tensor]],
) -> list[Tensor]:
    """The results of a search for a matrix, each (out, groups or super-blocks).

    Args:
        weight: the weights (out, in).
        importance: the weight of the squared error of each column (in,).
        group: the columns of a group.
        block: the columns of a super-block, or of a group.
        search: returns tensors (groups or super-blocks, rows) for some of the weights.
    """
    width = max(1, _TILE_COLUMNS // block) * block
    height = max(1, _TILE // min(width, weight.shape[1]))
    weighting = _relative(importance.float())
    slabs = []
    for columns in _slices(weight.shape[1], width):
        own = weighting[columns].view(-1, group).t().unsqueeze(2).contiguous()
        parts = [
            search(Weights(_grouped(weight[rows, columns], group), own))
            for rows in _slices(len(weight), height)
        ]
        slabs.append([torch.cat(results, 1) for results in zip(*parts, strict=True)])
    return [torch.cat(results).t().contiguous() for results in zip(*slabs, strict=True)]


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _grouped(weight: Tensor, group: int) -> Tensor:
    """Weights (rows, columns) as (columns of a group, groups, rows)."""
    return weight.float().reshape(len(weight), -1, group).permute(2, 1, 0).contiguous()


def _relative(importance: Tensor) -> Tensor:
    """Importance relative to its mean, and not 0."""
    mean = importance.mean()
    if not mean > 0:
        return torch.ones_like(importance)
    return (importance / mean).clamp_min(_LEAST_WEIGHTING)
