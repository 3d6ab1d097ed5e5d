"""Weights that act on single channels: each channel is a small pruning problem of its own.

The channels of a depthwise convolution, or of a vector with one weight per channel, share no Gram
matrix. A channel has only a few weights, so the multiple removal problem is solved by enumeration:
first the best removal set of each size in each channel, then the best combination of sizes.
"""

from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor

from apt.patterns import Pattern, lowest_k
from apt.solver.gram import DAMPING
from apt.solver.options import Solution
from apt.solver.precision import full_precision

_EXHAUSTIVE = 8  # weights per channel up to which all sets are tried; above, sets grow greedily
_CHUNK = 2**22  # elements of the largest temporary: 32 MiB in fp64


@full_precision()
def prune_channels(
    weight: Tensor,
    gram: Tensor,
    pattern: Pattern,
    *,
    compensated: bool = True,
    damping: float = DAMPING,
) -> Solution:
    """Prune ``weight`` (channels, k) under a loss that is quadratic in each channel.

    Args:
        gram: the Gram matrix of each channel (channels, k, k): the loss of a removal set P is
            ``w_P G_PP w_Pᵀ``.
        pattern: n:m in groups along k, whose removal sets are all tried, or a share of all weights.
        compensated: True to update the kept weights of a channel, which compensates for the
            removed ones and reduces the loss to ``w_P ([H⁻¹]_PP)⁻¹ w_Pᵀ``.
        damping: λ as a share of a channel's mean diagonal, for ``H = G + λI``.
    """
    matrix = _inverse(gram.double(), damping) if compensated else gram.double()
    problem = _Problem(weight.double(), matrix, compensated)
    mask = _mask(problem, pattern)
    return Solution(problem.pruned(mask).to(weight), mask, damping if compensated else None)


def _inverse(gram: Tensor, damping: float) -> Tensor:
    """``H⁻¹`` of each channel (channels, k, k)."""
    means = gram.diagonal(dim1=1, dim2=2).mean(1)
    shift = damping * means + 1e-9 * means.mean() + torch.finfo(gram.dtype).tiny
    damped = gram + torch.diag_embed(shift[:, None].expand(-1, gram.shape[1]))
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


class _Problem:
    """Weights (channels, k) in fp64, with ``H⁻¹`` if compensated, else ``G`` (channels, k, k)."""

    def __init__(self, weight: Tensor, matrix: Tensor, compensated: bool) -> None:
        self.weight, self._matrix, self._compensated = weight, matrix, compensated
        self.channels, self.width = weight.shape

    def parts(self, sets: int) -> Iterator["_Problem"]:
        """The problem in chunks of channels, for each of which that many sets are tried."""
        size = sets * self.width * (self.width if self._compensated else 1)
        for start in range(0, self.channels, step := max(1, _CHUNK // size)):
            here = slice(start, start + step)
            yield _Problem(self.weight[here], self._matrix[here], self._compensated)

    def losses(self, sets: Tensor) -> Tensor:
        """The losses (channels, sets) of ``sets`` (channels or 1, sets, k), True = removed."""
        removed = self.weight[:, None] * sets
        image = self._multipliers(removed, sets) if self._compensated else removed @ self._matrix
        return (removed * image).sum(-1)

    def pruned(self, mask: Tensor) -> Tensor:
        """The weights (channels, k) after the removal of ``mask`` (channels, k)."""
        if not self._compensated:
            return self.weight.masked_fill(mask, 0)
        removed = (self.weight * mask)[:, None]
        change = self._multipliers(removed, mask[:, None]) @ self._matrix
        return (self.weight - change[:, 0]).masked_fill(mask, 0)

    def _multipliers(self, removed: Tensor, sets: Tensor) -> Tensor:
        """``w_P ([H⁻¹]_PP)⁻¹`` of each set, zero outside P, by one padded system for each set."""
        within = sets[..., None, :] & sets[..., :, None]
        system = self._matrix[:, None] * within + torch.diag_embed((~sets).to(removed))
        solved: Tensor = torch.linalg.solve(system, removed[..., None])
        return solved[..., 0]


def _mask(problem: _Problem, pattern: Pattern) -> Tensor:
    if size := pattern.group:
        sets = _sets(size, pattern.required((1, size)), problem.weight.device)
        parts = problem.parts(len(sets))
        return torch.cat([_by_groups(part, sets, size) for part in parts])
    return _by_sizes(problem, pattern)


def _sets(width: int, size: int, device: torch.device) -> Tensor:
    """All sets of ``size`` out of ``width`` (sets, width)."""
    chosen = torch.tensor(list(combinations(range(width), size)), dtype=torch.long)
    sets = torch.zeros(len(chosen), width, dtype=torch.bool)
    return sets.scatter_(1, chosen.view(len(chosen), size), True).to(device)


def _best(problem: _Problem, sets: Tensor) -> tuple[Tensor, Tensor]:
    """The best of ``sets`` (channels or 1, sets, k) for each channel, and its loss."""
    losses, place = problem.losses(sets).min(1)
    every = sets.expand(problem.channels, -1, -1)
    return every[torch.arange(problem.channels, device=sets.device), place], losses


def _path(problem: _Problem) -> Iterator[tuple[Tensor, Tensor]]:
    """For each size from 1 on, a set for each channel (channels, k) and its loss (channels,)."""
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


def _by_sizes(problem: _Problem, pattern: Pattern) -> Tensor:
    """The mask for a share of all weights, or of the weights of each channel."""
    path = list(_path(problem))
    if pattern.by_row:
        size = pattern.required((1, problem.width))
        sizes = torch.full((problem.channels,), size, device=problem.weight.device)
    else:
        rising = _hull(torch.stack([losses for _, losses in path], 1))
        count = pattern.required((problem.channels, problem.width))
        sizes = lowest_k(rising.reshape(1, -1), count).view_as(rising).sum(1)
    none = torch.zeros_like(path[0][0])
    sets = torch.stack([none, *(sets for sets, _ in path)])
    return sets[sizes, torch.arange(problem.channels, device=sizes.device)]


def _hull(losses: Tensor) -> Tensor:
    """The cost of each further removal (channels, k) on the lower convex hull of ``losses``.

    The costs of a channel never fall. So the cheapest removals over all channels are always the
    first ones of each channel.
    """
    points = torch.cat([losses.new_zeros(len(losses), 1), losses], 1)
    place = torch.arange(losses.shape[1], device=losses.device)
    steps = place + 1 - place[:, None]  # from a start (rows) to behind an end (columns)
    means = (points[:, None, 1:] - points[:, :-1, None]) / steps
    # Isotonic regression: at each place, the maximum over starts of the minimum over ends.
    lowest = means.masked_fill(steps < 1, torch.inf).flip(2).cummin(2).values.flip(2)
    return lowest.masked_fill(steps < 1, -torch.inf).max(1).values


def _by_groups(problem: _Problem, sets: Tensor, size: int) -> Tensor:
    """The mask for n:m: in each group the best of ``sets`` (sets, m), given the others."""
    mask = torch.zeros_like(problem.weight, dtype=torch.bool)
    starts = range(0, problem.width, size)
    for start in [*starts, *(starts if len(starts) > 1 else ())]:
        tried = mask[:, None].repeat(1, len(sets), 1)
        tried[:, :, start : start + size] = sets
        mask, _ = _best(problem, tried)
    return mask
