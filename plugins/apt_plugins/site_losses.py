"""The losses of sites at every sparsity, and sites that are pruned for a moment.

The scores are squared weights in the balanced scaling, in which the default method ranks them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Site
from apt.calibration.batches import Batch
from apt.calibration.capture import as_rows
from apt.planning.allocation import sparsity_of
from apt.planning.plan import PlannedSite
from apt.pruning.layer import mean_square
from apt.solver import Gram, Pattern, joint_weights

LEVELS = 512
"""The number of levels of the sparsity."""

_DAMPING = 0.05
_SORTED = 2**17  # scores of a kind of sites in a block that are sorted, about
_KNOTS = (0.3, 0.5, 0.7, 0.9)  # sparsities at which the loss with exact weights is computed
_ROWS = 32  # rows of a site on which it is computed
_EXPERTS = 4  # experts of a kind on which it is computed


def site_grams(
    adapter: Adapter, block: nn.Module, index: int, sites: Sequence[Site], batches: list[Batch]
) -> dict[Site, Gram]:
    """The Gram matrices of the inputs of the sites; the batches pass the block."""
    sums, first = dict[str, Gram](), dict[str, Site]()
    weights = {site: site.oriented(site.weight(block).data) for site in sites}
    for site in sites:
        first.setdefault(site.input, site)
        sums.setdefault(site.input, Gram(weights[site].shape[1], weights[site].device))

    def add(site: Site, inputs: Tensor) -> None:
        if first[site.input] is site:
            sums[site.input].add(as_rows(site, inputs, weights[site]))

    with adapter.capture(block, sites, add):
        for batch in batches:
            batch.state = adapter.step(block, batch.state, batch.calls[index])
    mean = mean_square(sums.values())
    whole = {name: gram.with_missing_tokens(mean) for name, gram in sums.items()}
    return {site: whole[site.input] for site in sites}


def losses_of(
    block: nn.Module, sites: Sequence[PlannedSite], grams: Mapping[Site, Gram]
) -> tuple[Tensor, Tensor]:
    """The loss of sites at every level of the sparsity (levels + 1,): plain and compensated.

    Without compensation, it is the sum of the scores. The share that is left with exact weights is
    computed on a few rows, at some levels.
    """
    levels = torch.linspace(0, 1, LEVELS + 1, dtype=torch.float64)
    scores = [_scores(block, planned.site, grams) for planned in sites]
    plain = _plain_losses(scores, _pattern(sites[0]), levels)
    few = list(zip(sites, scores, strict=True))[:: max(1, len(sites) // _EXPERTS)]
    left = torch.stack([_shares_left(block, *pair, grams) for pair in few]).mean(0)
    return plain, plain * _interpolated(levels, torch.tensor([*_KNOTS, 1.0]), left)


def _plain_losses(scores: Sequence[Tensor], pattern: Pattern, levels: Tensor) -> Tensor:
    """The sums of the scores that are removed at each level; linear between the knots."""
    if (knots := pattern.knots) is not None:
        sums = [sum(_removed(score, pattern, knot) for score in scores) for knot in knots]
        return _interpolated(levels, torch.tensor(knots), torch.tensor(sums, dtype=torch.float64))
    every = sum(score.numel() for score in scores)
    some = torch.cat([_spaced(score, every // _SORTED) for score in scores])
    ordered = some.sort().values.double() * (every / len(some))
    below = torch.cat([torch.zeros_like(ordered[:1]), ordered.cumsum(0)]).cpu()
    return below[(levels * len(ordered)).long()]


def _spaced(scores: Tensor, distance: int) -> Tensor:
    """Evenly spaced scores, from all columns: the distance, at least 1, has no factor of theirs."""
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
    """The mask (out, in) of the lowest scores, of that sparsity or of the nearest n:m."""
    return _pattern(site).at(sparsity).lowest(scores)


def _shares_left(
    block: nn.Module, planned: PlannedSite, scores: Tensor, grams: Mapping[Site, Gram]
) -> Tensor:
    """The share of the loss that is left with exact weights, at each knot (knots + 1,)."""
    site, damped = planned.site, grams[planned.site].damped(_DAMPING)
    weight = site.oriented(site.weight(block).data).to(damped.matrix.dtype)
    rows = torch.linspace(0, len(weight) - 1, min(_ROWS, len(weight))).long().to(weight.device)
    left = []
    for knot in _KNOTS:
        mask = removed_at(scores, planned, knot)[rows]
        removed = weight[rows] * mask
        plain = float(((removed @ damped.matrix) * removed).sum()) / 2
        solved = float(joint_weights(weight[rows], damped, mask).loss.sum())
        left.append(solved / plain if plain > 0 else 1.0)
    return torch.tensor([*left, 1.0], dtype=torch.float64)


def _interpolated(places: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear interpolation, constant before the first knot."""
    right = torch.searchsorted(knots.double(), places).clamp(1, len(knots) - 1)
    start, end = knots[right - 1].double(), knots[right].double()
    part = ((places - start) / (end - start)).clamp(0, 1)
    return values[right - 1] * (1 - part) + values[right] * part


def _scores(block: nn.Module, site: Site, grams: Mapping[Site, Gram]) -> Tensor:
    """The squared weights (out, in) in the scaling in which the default method ranks them."""
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
