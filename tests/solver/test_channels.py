"""`prune_channels` against the enumeration of all removal sets."""

from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.solver import NM, Unstructured, channels, meets
from apt.solver.channels import prune_channels


def problem(seed, channels, width):
    """Weights and Gram matrices of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, width, width, generator=generator, dtype=torch.float64)
    inputs = torch.randn(channels, 40, width, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(channels, width, generator=generator, dtype=torch.float64)
    return weight, inputs.mT @ inputs


def loss_of(weight, gram, removed, compensated):
    """The loss and the weights of one channel without ``removed``, by direct solution."""
    pruned = weight.clone()
    pruned[removed] = 0
    kept = [j for j in range(len(weight)) if j not in removed]
    if compensated and kept:
        pruned[kept] = torch.linalg.solve(gram[kept][:, kept], (gram @ weight)[kept])
    return float((pruned - weight) @ gram @ (pruned - weight)), pruned


def total(weight, gram, solution):
    lost = solution.weight - weight
    return float(torch.einsum("ck,ckl,cl->", lost, gram, lost))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([NM(2, 4), NM(1, 4), NM(1, 2)]))
def test_n_m_mask_of_channels_has_the_least_loss(seed, compensated, pattern):
    weight, gram = problem(seed, 3, pattern.m)
    result = prune_channels(weight, gram, pattern, compensated=compensated, damping=0.0)
    assert meets(result.weight, pattern)
    for channel in range(3):
        losses = [
            loss_of(weight[channel], gram[channel], list(removed), compensated)
            for removed in combinations(range(pattern.m), pattern.m - pattern.n)
        ]
        pruned = min(losses, key=lambda pair: pair[0])[1]
        torch.testing.assert_close(result.weight[channel], pruned, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compensated", [False, True])
def test_chunks_of_channels_give_the_same_solution(compensated, monkeypatch):
    weight, gram = problem(4, 5, 8)
    whole = prune_channels(weight, gram, NM(2, 4), compensated=compensated)
    monkeypatch.setattr(channels, "_CHUNK", 1)
    parts = prune_channels(weight, gram, NM(2, 4), compensated=compensated)
    assert torch.equal(parts.mask, whole.mask)
    assert torch.equal(parts.weight, whole.weight)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_set_sizes_are_optimal_for_convex_losses(seed, compensated):
    weight, gram = problem(seed, 3, 3)
    result = prune_channels(weight, gram, Unstructured(4 / 9), compensated=compensated, damping=0.0)
    assert int(result.mask.sum()) == 4
    subsets = [s for size in range(4) for s in combinations(range(3), size)]
    losses = [
        {s: loss_of(weight[c], gram[c], list(s), compensated)[0] for s in subsets} for c in range(3)
    ]
    curves = [
        [min(x for s, x in table.items() if len(s) == n) for n in range(4)] for table in losses
    ]
    best = min(
        sum(table[s] for table, s in zip(losses, choice, strict=True))
        for choice in product(subsets, repeat=3)
        if sum(map(len, choice)) == 4
    )
    convex = all(c[0] - 2 * c[1] + c[2] >= 0 and c[1] - 2 * c[2] + c[3] >= 0 for c in curves)
    if convex:
        assert total(weight, gram, result) == pytest.approx(best, rel=1e-5)
    assert total(weight, gram, result) >= best * (1 - 1e-6)


def test_share_per_row_prunes_the_same_number_in_each_channel():
    weight, gram = problem(0, 5, 4)
    result = prune_channels(weight, gram, Unstructured(0.5, "row"))
    assert result.mask.sum(1).tolist() == [2] * 5


def test_greedy_sets_of_long_channels_lose_less_than_diagonal_scores():
    weight, gram = problem(1, 6, 16)
    result = prune_channels(weight, gram, Unstructured(0.5), compensated=False)
    assert int(result.mask.sum()) == 48
    assert torch.equal(result.weight, weight.masked_fill(result.mask, 0))
    own = weight.square() * gram.diagonal(dim1=1, dim2=2)
    naive = torch.zeros_like(result.mask).view(-1)
    naive[own.view(-1).topk(48, largest=False).indices] = True
    lost = weight * naive.view_as(weight)
    assert total(weight, gram, result) < float(torch.einsum("ck,ckl,cl->", lost, gram, lost))


def test_dead_channels_are_pruned_first_with_finite_weights():
    weight, gram = problem(2, 4, 4)
    gram[1] = 0
    result = prune_channels(weight, gram, Unstructured(0.25))
    assert result.mask[1].all()
    assert result.weight.isfinite().all()


def test_channels_of_one_weight_are_ranked_by_loss():
    weight, gram = problem(3, 10, 1)
    result = prune_channels(weight, gram, Unstructured(0.3))
    losses = (weight.square() * gram[:, :, 0]).view(-1)
    assert set(result.mask.view(-1).nonzero().view(-1).tolist()) == set(
        losses.topk(3, largest=False).indices.tolist()
    )
