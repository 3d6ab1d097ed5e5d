"""The order of a weight's columns in which an n:m pattern keeps the most.

Columns of large scores are first dealt out to the groups. Then one column of every group at a time
is taken out, and they are given back by an optimal assignment. (Pool and Yu, Channel Permutations
for N:M Sparsity, NeurIPS 2021, exchange two columns at a time.)
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from apt.patterns import Pattern

_ROUNDS = 2  # times that each place of a group is assigned


def best_order(scores: Tensor, pattern: Pattern) -> Tensor:
    """The order in which the groups of n:m keep the most of the scores.

    Args:
        scores: non-negative scores (rows, columns) in fp32; the number of columns is a multiple of
            ``m``.
        pattern: n:m.

    Returns:
        The former index of each column (columns,).
    """
    assert pattern.group is not None
    size, kept = pattern.group, pattern.group - pattern.required((1, pattern.group))
    groups = scores.sum(0).argsort(descending=True, stable=True).view(size, -1).T.clone()
    for place in list(range(size)) * _ROUNDS:
        rest = groups[:, [other for other in range(size) if other != place]]
        taken = groups[:, place]
        benefit = _benefits(scores, taken, rest, kept)
        _, given = linear_sum_assignment(benefit.cpu().numpy(), maximize=True)
        groups[:, place] = taken[torch.from_numpy(given).to(taken.device)]
    return groups.flatten()


def _benefits(scores: Tensor, taken: Tensor, rest: Tensor, n: int) -> Tensor:
    """What each group of ``rest`` keeps more (groups, taken) with each column of ``taken``.

    A group that keeps n of its scores in a row keeps a further one if that is larger than the n-th
    largest, in place of it.
    """
    new = scores[:, taken].T.contiguous()
    nth = scores[:, rest.flatten()].view(len(scores), *rest.shape).topk(n, dim=2).values[..., -1]
    nth = nth.T.contiguous()
    # Σ max(0, a − b) = (Σ |a − b| + Σ a − Σ b) / 2
    return (torch.cdist(nth, new, p=1) + new.sum(1) - nth.sum(1, keepdim=True)) / 2
