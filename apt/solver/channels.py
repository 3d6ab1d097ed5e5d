"""Weights that act channel by channel: each channel is a small pruning problem of its own.

A depthwise convolution, or a vector of one weight a channel, has no Gram matrix in common. With a
handful of weights a channel, what the multiple removal problem asks for can be found by trying:
the best set of every size, and then the sizes that fit together best.
"""

from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor

from apt.solver.gram import DAMPING
from apt.solver.options import Solution
from apt.solver.patterns import NM, Pattern, Unstructured, lowest_k

_EXHAUSTIVE = 8  # weights a channel up to which all sets are tried; beyond, sets grow greedily


def prune_channels(
    weight: Tensor,
    gram: Tensor,
    pattern: Pattern,
    *,
    compensated: bool = True,
    damping: float = DAMPING,
) -> Solution:
    """Prune ``weight`` (channels, k), whose loss in each channel is quadratic.

    Args:
        weight: the weights.
        gram: of each channel (channels, k, k): removing a set P loses ``w_P G_PP w_Pᵀ``.
        pattern: n:m in groups along k, or a share of all weights.
        compensated: whether the kept weights of a channel make up for the removed ones, which
            leaves ``w_P ([H⁻¹]_PP)⁻¹ w_Pᵀ``.
        damping: λ as a share of a channel's mean diagonal, for ``H = G + λI``.
    """
    problem = _Problem(weight.double(), gram.double(), compensated, damping)
    mask = _mask(problem, pattern)
    return Solution(problem.pruned(mask).to(weight), mask, damping if compensated else None)


class _Problem:
    """The losses of removal sets in every channel."""

    def __init__(self, weight: Tensor, gram: Tensor, compensated: bool, damping: float) -> None:
        self.weight, self._gram, self._compensated = weight, gram, compensated
        self.channels, self.width = weight.shape
        if compensated:
            means = gram.diagonal(dim1=1, dim2=2).mean(1)
            shift = damping * means + 1e-9 * means.mean() + torch.finfo(weight.dtype).tiny
            damped = gram + torch.diag_embed(shift[:, None].expand(-1, self.width))
            self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))

    def losses(self, sets: Tensor) -> Tensor:
        """Of ``sets`` (channels or 1, sets, k), True where removed: (channels, sets)."""
        removed = self.weight[:, None] * sets
        pull = self._pull(removed, sets) if self._compensated else removed @ self._gram
        return (removed * pull).sum(-1)

    def pruned(self, mask: Tensor) -> Tensor:
        """The weights (channels, k) once ``mask`` is removed."""
        if not self._compensated:
            return self.weight.masked_fill(mask, 0)
        removed = (self.weight * mask)[:, None]
        change = self._pull(removed, mask[:, None]) @ self._inverse
        return (self.weight - change[:, 0]).masked_fill(mask, 0)

    def _pull(self, removed: Tensor, sets: Tensor) -> Tensor:
        """``w_P ([H⁻¹]_PP)⁻¹`` of every set, zero elsewhere: one padded system for each."""
        within = sets[..., None, :] & sets[..., :, None]
        system = self._inverse[:, None] * within + torch.diag_embed((~sets).to(removed))
        solved: Tensor = torch.linalg.solve(system, removed[..., None])
        return solved[..., 0]


def _mask(problem: _Problem, pattern: Pattern) -> Tensor:
    if isinstance(pattern, NM):
        return _by_groups(problem, pattern)
    return _by_sizes(problem, pattern)


def _sets(width: int, size: int, device: torch.device) -> Tensor:
    """All sets of ``size`` out of ``width`` (sets, width)."""
    chosen = torch.tensor(list(combinations(range(width), size)), dtype=torch.long)
    sets = torch.zeros(len(chosen), width, dtype=torch.bool)
    return sets.scatter_(1, chosen.view(len(chosen), size), True).to(device)


def _best(problem: _Problem, sets: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``sets`` (channels or 1, sets, k), the best one of each channel, and its loss."""
    losses, place = problem.losses(sets).min(1)
    every = sets.expand(problem.channels, -1, -1)
    return every[torch.arange(problem.channels, device=sets.device), place], losses


def _path(problem: _Problem) -> Iterator[tuple[Tensor, Tensor]]:
    """For every size from 1 on, a set of each channel (channels, k) and its loss (channels,)."""
    device = problem.weight.device
    single = torch.eye(problem.width, dtype=torch.bool, device=device)
    current = torch.zeros(problem.channels, problem.width, dtype=torch.bool, device=device)
    for size in range(1, problem.width + 1):
        if problem.width <= _EXHAUSTIVE:
            current, losses = _best(problem, _sets(problem.width, size, device)[None])
        else:
            grown = problem.losses(current[:, None] | single)
            losses, place = grown.masked_fill(current, torch.inf).min(1)
            current = current | single[place]
        yield current, losses


def _by_sizes(problem: _Problem, pattern: Unstructured) -> Tensor:
    """The mask for a share of all weights, or of each channel's."""
    found = list(_path(problem))
    if pattern.per == "row":
        size = pattern.count(problem.width)
        sizes = torch.full((problem.channels,), size, device=problem.weight.device)
    else:
        rising = _hull(torch.stack([losses for _, losses in found], 1))
        count = pattern.count(rising.numel())
        sizes = lowest_k(rising.reshape(1, -1), count).view_as(rising).sum(1)
    none = torch.zeros_like(found[0][0])
    sets = torch.stack([none, *(sets for sets, _ in found)])
    return sets[sizes, torch.arange(problem.channels, device=sizes.device)]


def _hull(losses: Tensor) -> Tensor:
    """What each further removal costs (channels, k) along the lower convex hull of ``losses``.

    Never falling, so that the cheapest removals of all channels begin with the first of each.
    """
    points = torch.cat([losses.new_zeros(len(losses), 1), losses], 1)
    place = torch.arange(losses.shape[1], device=losses.device)
    steps = place + 1 - place[:, None]  # from a start (rows) to behind an end (columns)
    means = (points[:, None, 1:] - points[:, :-1, None]) / steps
    # Isotonic regression: at each place, the highest over its starts of the lowest over its ends.
    lowest = means.masked_fill(steps < 1, torch.inf).flip(2).cummin(2).values.flip(2)
    return lowest.masked_fill(steps < 1, -torch.inf).max(1).values


def _by_groups(problem: _Problem, pattern: NM) -> Tensor:
    """The mask for n:m: the best set of each group beside those of the others, in two rounds."""
    device = problem.weight.device
    options = _sets(pattern.m, pattern.m - pattern.n, device)
    mask = torch.zeros(problem.channels, problem.width, dtype=torch.bool, device=device)
    starts = range(0, problem.width, pattern.m)
    for start in [*starts, *(starts if len(starts) > 1 else ())]:
        tried = mask[:, None].repeat(1, len(options), 1)
        tried[:, :, start : start + pattern.m] = options
        mask, _ = _best(problem, tried)
    return mask
