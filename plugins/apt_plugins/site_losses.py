"""The losses of sites at every sparsity, and a context with temporarily pruned sites.

The scores are squared weights in the balanced scaling, in which the default method ranks weights.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Site
from apt.calibration.batches import Batch
from apt.calibration.capture import grams_of
from apt.planning.allocation import sparsity_of
from apt.planning.plan import PlannedSite
from apt.pruning.layer import mean_square
from apt.solver import Gram, Pattern, joint_weights

LEVELS = 512
"""The number of levels of the sparsity."""

_DAMPING = 0.05
_SORTED = 2**17  # the approximate number of sorted scores for a kind of sites in a block
_KNOTS = (0.3, 0.5, 0.7, 0.9)  # sparsities at which the loss with exact weights is computed
_ROWS = 32  # the rows of a site for this computation
_EXPERTS = 4  # the experts of a kind for this computation


def site_grams(
    adapter: Adapter, block: nn.Module, index: int, sites: Sequence[Site], batches: list[Batch]
) -> dict[Site, Gram]:
    """The Gram matrices of the inputs of the sites; the batches are run through the block."""
    sums = grams_of(adapter, block, index, sites, batches)
    mean = mean_square(sums.values())
    complete = {name: gram.with_missing_tokens(mean) for name, gram in sums.items()}
    return {site: complete[site.input] for site in sites}


def losses_of(
    block: nn.Module, sites: Sequence[PlannedSite], grams: Mapping[Site, Gram]
) -> tuple[Tensor, Tensor]:
    """The loss of sites at every level of the sparsity (levels + 1,): plain and compensated.

    The plain loss is the sum of the scores. The share that remains with exact weights is computed
    on a few rows, at a few levels.
    """
    levels = torch.linspace(0, 1, LEVELS + 1, dtype=torch.float64)
    scores = [_scores(block, planned.site, grams) for planned in sites]
    plain = _plain_losses(scores, _pattern(sites[0]), levels)
    examples = list(zip(sites, scores, strict=True))[:: max(1, len(sites) // _EXPERTS)]
    remaining = torch.stack([_shares_left(block, *pair, grams) for pair in examples]).mean(0)
    return plain, plain * _interpolated(levels, torch.tensor([*_KNOTS, 1.0]), remaining)


def _plain_losses(scores: Sequence[Tensor], pattern: Pattern, levels: Tensor) -> Tensor:
    """The sums of the scores that are removed at each level; linear between the knots."""
    if (knots := pattern.knots) is not None:
        sums = [sum(_removed(score, pattern, knot) for score in scores) for knot in knots]
        return _interpolated(levels, torch.tensor(knots), torch.tensor(sums, dtype=torch.float64))
    count = sum(score.numel() for score in scores)
    sample = torch.cat([_spaced(score, count // _SORTED) for score in scores])
    ordered = sample.sort().values.double() * (count / len(sample))
    below = torch.cat([torch.zeros_like(ordered[:1]), ordered.cumsum(0)]).cpu()
    return below[(levels * len(ordered)).long()]


def _spaced(scores: Tensor, distance: int) -> Tensor:
    """Evenly spaced scores; the distance and the number of columns have no common factor."""
    distance = max(1, distance)
    while math.gcd(distance, scores.shape[1]) > 1:
        distance += 1
    return scores.flatten()[::distance]


def _removed(scores: Tensor, pattern: Pattern, sparsity: float) -> float:
    """The sum of the scores that a sparsity removes; at 0 nothing, at 1 everything."""
    if not 0 < sparsity < 1:
        return float(scores.double().sum()) * sparsity
    return float(scores[pattern.at(sparsity).lowest(scores)].double().sum())


def _pattern(site: PlannedSite) -> Pattern:
    """The pattern of a site whose sparsity an allocation can change."""
    return cast(Pattern, site.pattern)


def removed_at(scores: Tensor, site: PlannedSite, sparsity: float) -> Tensor:
    """The mask (out, in) of the lowest scores, at a sparsity or at the nearest n:m."""
    return _pattern(site).at(sparsity).lowest(scores)


def _shares_left(
    block: nn.Module, planned: PlannedSite, scores: Tensor, grams: Mapping[Site, Gram]
) -> Tensor:
    """The share of the loss that remains with exact weights, at each knot (knots + 1,)."""
    site, damped = planned.site, grams[planned.site].damped(_DAMPING)
    weight = site.oriented(site.weight(block).data).to(damped.matrix.dtype)
    rows = torch.linspace(0, len(weight) - 1, min(_ROWS, len(weight))).long().to(weight.device)
    shares = []
    for knot in _KNOTS:
        mask = removed_at(scores, planned, knot)[rows]
        removed = weight[rows] * mask
        plain = float(((removed @ damped.matrix) * removed).sum()) / 2
        solved = float(joint_weights(weight[rows], damped, mask).loss.sum())
        shares.append(solved / plain if plain > 0 else 1.0)
    return torch.tensor([*shares, 1.0], dtype=torch.float64)


def _interpolated(places: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear interpolation, constant before the first knot."""
    right = torch.searchsorted(knots.double(), places).clamp(1, len(knots) - 1)
    start, end = knots[right - 1].double(), knots[right].double()
    part = ((places - start) / (end - start)).clamp(0, 1)
    return values[right - 1] * (1 - part) + values[right] * part


def _scores(block: nn.Module, site: Site, grams: Mapping[Site, Gram]) -> Tensor:
    """The squared weights (out, in) in the scaling of the default method."""
    weight = site.oriented(site.weight(block).data).float()
    return (weight * grams[site].damped(_DAMPING).balanced.scale).square()


@contextmanager
def pruned(
    block: nn.Module, sites: Sequence[PlannedSite], grams: Mapping[Site, Gram]
) -> Iterator[None]:
    """Inside the context, the weights of the lowest scores of each site are zero."""
    kept = list[tuple[Tensor, Tensor]]()
    try:
        for planned in sites:
            weight = planned.site.oriented(planned.site.weight(block).data)
            kept.append((weight, weight.clone()))
            scores = _scores(block, planned.site, grams)
            weight.masked_fill_(removed_at(scores, planned, sparsity_of(planned)), 0)
        yield
    finally:
        for weight, dense in kept:
            weight.copy_(dense)
