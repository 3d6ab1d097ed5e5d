"""The losses of the levels of some rows of a weight: of their zeros, and of their rounding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apt.fit.levels import Level
from apt.patterns import Grid, Pattern, Points
from apt.solver import rounded

Terms = Sequence[tuple[Tensor, Tensor]]
"""Pairs of b (out,) and G (in, in), whose losses add up; see `apt.fit.losses`."""

_Form = tuple[Pattern | None, Grid | None]


@dataclass
class SampledLevel:
    """A level, measured on some rows of one or several weights.

    Attributes:
        loss: the sum of their losses.
        zeros, weights: the sums of their zeros and of all their weights.
    """

    loss: float = 0.0
    zeros: int = 0
    weights: int = 0

    @property
    def share(self) -> float:
        """The share of zeros."""
        return self.zeros / max(self.weights, 1)

    def add(self, other: "SampledLevel") -> None:
        """Add the sums of other weights."""
        self.loss += other.loss
        self.zeros += other.zeros
        self.weights += other.weights


def sampled_levels(
    pruned: Callable[[Pattern | None], Tensor],
    matrix: Tensor,
    terms: Terms,
    held: Terms,
    levels: Sequence[Level],
) -> list[SampledLevel]:
    """The measured levels of a weight (out, in).

    Args:
        pruned: the weight with the zeros of a pattern; for None, the weight itself.
        matrix: the matrix H (in, in) of the rounding.
        terms: the pairs of b (out,) and G (in, in), with all factors.
        held: the same of other tokens than those to which the zeros are fitted.
    """

    def loss(change: Tensor, terms: Terms = terms) -> float:
        return sum(float((((change @ g) * change).sum(1) * b).sum()) for b, g in terms)

    weights = {pattern: pruned(pattern) for pattern in (None, *(x.pattern for x in levels))}
    removal = {pattern: loss(kept - weights[None], held) for pattern, kept in weights.items()}
    forms: list[_Form] = [(level.pattern, level.grid) for level in levels]
    found: dict[_Form, Points] = {
        (pattern, grid): grid.points(weights[pattern], matrix.diagonal(), torch.float32)
        for pattern, grid in forms
        if grid
    }
    nearest = {form: points.rounded(weights[form[0]]) for form, points in found.items()}
    plain = {form: loss(values - weights[form[0]]) for form, values in nearest.items()}
    # The loss of the grid in the middle: the share at very small losses is lost in rounding.
    middle = sorted(plain, key=lambda form: plain[form])[len(plain) // 2] if plain else (None, None)
    kept, grid, share = weights[middle[0]], middle[1], 1.0
    if grid is not None and plain[middle] > 0:
        share = loss(rounded(kept, matrix, grid, passes=1).weight - kept) / plain[middle]
    return [
        SampledLevel(
            removal[form[0]] + plain.get(form, 0.0) * share,
            int((nearest.get(form, weights[form[0]]) == 0).sum()),
            weights[None].numel(),
        )
        for form in forms
    ]
