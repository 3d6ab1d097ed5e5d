"""The order of columns in which n:m keeps the most."""

from itertools import permutations

import pytest
import torch

from apt.solver import NM
from apt.solver.permutation import best_order


def kept(scores, pattern):
    """The sum of the scores that the groups keep."""
    return float(scores.unflatten(1, (-1, pattern.m)).topk(pattern.n, 2).values.sum())


def scores_of(rows, columns, seed=0):
    """Scores (rows, columns); some columns have much larger scores than others."""
    torch.manual_seed(seed)
    return (torch.randn(rows, columns) * torch.randn(columns).exp()).square()


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(1, 2), NM(5, 8)], ids=str)
def test_best_order_is_a_permutation_that_keeps_larger_scores(pattern):
    scores = scores_of(48, 64)
    order = best_order(scores, pattern)
    assert sorted(order.tolist()) == [*range(64)]
    lost = [float(scores.sum()) - kept(s, pattern) for s in (scores, scores[:, order])]
    assert lost[1] < 0.9 * lost[0]


def test_columns_of_large_scores_are_spread_over_the_groups():
    scores = torch.ones(6, 8) * torch.tensor([9.0, 9, 9, 9, 1, 1, 1, 1])
    order = best_order(scores, NM(2, 4)).view(2, 4)
    assert sorted((scores[0][order] == 9).sum(1).tolist()) == [2, 2]


def test_best_order_is_within_2_percent_of_the_optimum():
    pattern = NM(1, 2)
    for seed in range(5):
        scores = scores_of(5, 6, seed)
        best = max(kept(scores[:, list(order)], pattern) for order in permutations(range(6)))
        assert kept(scores[:, best_order(scores, pattern)], pattern) >= 0.98 * best
