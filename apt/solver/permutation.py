"""The order of a weight's columns in which an n:m pattern keeps the largest total score.

Columns of large scores are first spread over the groups. Then one column of every group is removed
at a time, and these columns return to the groups by an optimal assignment. (Pool and Yu, Channel
Permutations for N:M Sparsity, NeurIPS 2021, exchange two columns at a time.)
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from apt.patterns import Pattern

_ROUNDS = 2  # assignments of each position of a group


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
        removed = groups[:, place]
        benefits = _benefits(scores, removed, rest, kept)
        _, assignment = linear_sum_assignment(benefits.cpu().numpy(), maximize=True)
        groups[:, place] = removed[torch.from_numpy(assignment).to(removed.device)]
    return groups.flatten()


def _benefits(scores: Tensor, columns: Tensor, rest: Tensor, n: int) -> Tensor:
    """The increase (groups, columns) of the kept score of each group of ``rest`` by each column.

    In a row, a group keeps its n largest scores. A further score replaces the n-th largest if it is
    larger.
    """
    values = scores[:, columns].T.contiguous()
    nth = scores[:, rest.flatten()].view(len(scores), *rest.shape).topk(n, dim=2).values[..., -1]
    nth = nth.T.contiguous()
    # Σ max(0, a − b) = (Σ |a − b| + Σ a − Σ b) / 2
    return (torch.cdist(nth, values, p=1) + values.sum(1) - nth.sum(1, keepdim=True)) / 2
