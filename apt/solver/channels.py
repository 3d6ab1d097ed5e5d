"""The pruning of weights that act on single channels: a small pruning problem for each channel.

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

    def chunks(self, sets: int) -> Iterator["_Problem"]:
        """The problem in chunks of channels, small enough for ``sets`` removal sets per channel."""
        size = sets * self.width * (self.width if self._compensated else 1)
        for start in range(0, self.channels, step := max(1, _CHUNK // size)):
            chunk = slice(start, start + step)
            yield _Problem(self.weight[chunk], self._matrix[chunk], self._compensated)

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
        """``w_P ([H⁻¹]_PP)⁻¹`` of each set, zero outside P, by one padded linear system each."""
        within = sets[..., None, :] & sets[..., :, None]
        system = self._matrix[:, None] * within + torch.diag_embed((~sets).to(removed))
        solved: Tensor = torch.linalg.solve(system, removed[..., None])
        return solved[..., 0]


def _mask(problem: _Problem, pattern: Pattern) -> Tensor:
    if size := pattern.group:
        sets = _sets(size, pattern.required((1, size)), problem.weight.device)
        chunks = problem.chunks(len(sets))
        return torch.cat([_group_mask(chunk, sets, size) for chunk in chunks])
    return _share_mask(problem, pattern)


def _sets(width: int, size: int, device: torch.device) -> Tensor:
    """All sets of ``size`` out of ``width`` (sets, width)."""
    chosen = torch.tensor(list(combinations(range(width), size)), dtype=torch.long)
    sets = torch.zeros(len(chosen), width, dtype=torch.bool)
    return sets.scatter_(1, chosen.view(len(chosen), size), True).to(device)


def _best_sets(problem: _Problem, sets: Tensor) -> tuple[Tensor, Tensor]:
    """The best of ``sets`` (channels or 1, sets, k) for each channel, and its loss."""
    losses, index = problem.losses(sets).min(1)
    expanded = sets.expand(problem.channels, -1, -1)
    return expanded[torch.arange(problem.channels, device=sets.device), index], losses


def _sets_by_size(problem: _Problem) -> Iterator[tuple[Tensor, Tensor]]:
    """For each size from 1 to k, the set of each channel (channels, k) and its loss (channels,)."""
    device = problem.weight.device
    single = torch.eye(problem.width, dtype=torch.bool, device=device)
    current = torch.zeros(problem.channels, problem.width, dtype=torch.bool, device=device)
    for size in range(1, problem.width + 1):
        if problem.width <= _EXHAUSTIVE:
            current, losses = _best_sets(problem, _sets(problem.width, size, device)[None])
        else:
            losses_of_larger = problem.losses(current[:, None] | single)
            losses, index = losses_of_larger.masked_fill(current, torch.inf).min(1)
            current = current | single[index]
        yield current, losses


def _share_mask(problem: _Problem, pattern: Pattern) -> Tensor:
    """The mask for a share of all weights, or of the weights of each channel."""
    by_size = list(_sets_by_size(problem))
    if pattern.by_row:
        size = pattern.required((1, problem.width))
        sizes = torch.full((problem.channels,), size, device=problem.weight.device)
    else:
        costs = _hull(torch.stack([losses for _, losses in by_size], 1))
        count = pattern.required((problem.channels, problem.width))
        sizes = lowest_k(costs.reshape(1, -1), count).view_as(costs).sum(1)
    empty_set = torch.zeros_like(by_size[0][0])
    sets = torch.stack([empty_set, *(sets for sets, _ in by_size)])
    return sets[sizes, torch.arange(problem.channels, device=sizes.device)]


def _hull(losses: Tensor) -> Tensor:
    """The cost of each further removal (channels, k) on the lower convex hull of ``losses``.

    The costs of a channel never decrease. So the cheapest removals over all channels are always
    the first removals of each channel.
    """
    points = torch.cat([losses.new_zeros(len(losses), 1), losses], 1)
    index = torch.arange(losses.shape[1], device=losses.device)
    steps = index + 1 - index[:, None]  # from a start (rows) to behind an end (columns)
    means = (points[:, None, 1:] - points[:, :-1, None]) / steps
    # Isotonic regression: at each place, the maximum over starts of the minimum over ends.
    lowest = means.masked_fill(steps < 1, torch.inf).flip(2).cummin(2).values.flip(2)
    return lowest.masked_fill(steps < 1, -torch.inf).max(1).values


def _group_mask(problem: _Problem, sets: Tensor, size: int) -> Tensor:
    """The mask for n:m: in each group the best of ``sets`` (sets, m), given the other groups."""
    mask = torch.zeros_like(problem.weight, dtype=torch.bool)
    starts = range(0, problem.width, size)
    for start in [*starts, *(starts if len(starts) > 1 else ())]:
        candidates = mask[:, None].repeat(1, len(sets), 1)
        candidates[:, :, start : start + size] = sets
        mask, _ = _best_sets(problem, candidates)
    return mask
