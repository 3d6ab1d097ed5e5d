"""The removal of groups of columns: exact weights, the joint loss, and the greedy search."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.solver import (
    ColumnGroups,
    Gram,
    GroupRemoval,
    SolverOptions,
    joint_removal,
    keep_columns,
    removal_loss,
)

OPTIONS = SolverOptions(damping=0.01)
remove_groups = GroupRemoval(joint_removal)


def problem(seed, out=6, width=12, tokens=80):
    """A weight, and a Gram matrix of correlated inputs, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(out, width, generator=generator, dtype=torch.float64), Gram.of(inputs)


def loss(weight, damped, solution):
    missing = solution - weight
    return float((missing @ damped.matrix * missing).sum()) / 2


def mask(width, *indices):
    result = torch.zeros(width, dtype=torch.bool)
    result[list(indices)] = True
    return result


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 999), removed=st.sets(st.integers(0, 11), min_size=1, max_size=11))
def test_kept_columns_are_the_least_squares_solution(seed, removed):
    weight, gram = problem(seed)
    damped, gone = gram.damped(0.01), mask(12, *removed)
    solved = keep_columns(weight, damped, gone)
    assert not solved.weight[:, gone].any()
    assert torch.equal(solved.mask, gone.expand(6, 12))
    gradient = ((solved.weight - weight) @ damped.matrix)[:, ~gone]
    assert float(gradient.abs().max()) < 1e-9 * float(damped.matrix.abs().max())


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 999), removed=st.sets(st.integers(0, 11), min_size=1, max_size=11))
def test_removal_loss_equals_the_loss_of_the_exact_weights(seed, removed):
    weight, gram = problem(seed)
    damped, gone = gram.damped(0.01), mask(12, *removed)
    expected = loss(weight, damped, keep_columns(weight, damped, gone).weight)
    assert removal_loss(weight, damped, gone) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("count", [12, 4], ids=["columns", "groups of three"])
def test_single_removal_has_the_least_loss(count):
    for seed in range(8):
        weight, gram = problem(seed)
        damped, groups = gram.damped(0.01), ColumnGroups(count, count - 1)
        result = remove_groups(weight, gram, groups, OPTIONS).mask[0]
        masks = [groups.columns(mask(count, index), 12) for index in range(count)]
        best = min(masks, key=lambda gone: removal_loss(weight, damped, gone))
        assert torch.equal(result, best)


def test_several_removals_are_near_optimal_and_beat_removal_by_score():
    """The references are all removal sets, and the sets of the smallest ``‖w_j‖² H_jj``."""
    shares, by_score = [], []
    for seed in range(8):
        weight, gram = problem(seed)
        damped = gram.damped(0.01)
        result = remove_groups(weight, gram, ColumnGroups(12, 7), OPTIONS).mask[0]
        every = [removal_loss(weight, damped, mask(12, *s)) for s in combinations(range(12), 5)]
        scores = weight.square().sum(0) * damped.matrix.diagonal()
        lowest = mask(12, *scores.topk(5, largest=False).indices.tolist())
        greedy = removal_loss(weight, damped, result)
        shares.append(greedy / min(every))
        by_score.append(removal_loss(weight, damped, lowest) / greedy)
    assert max(shares) < 1.5
    assert min(by_score) > 1 - 1e-9
    assert sum(by_score) / len(by_score) > 1.2


def test_each_bin_loses_the_same_number_of_groups():
    weight, gram = problem(0)
    result = remove_groups(weight, gram, ColumnGroups(6, 3, bins=3), OPTIONS).mask[0]
    assert result.view(3, 2, 2).all(2).sum(1).tolist() == [1, 1, 1]
    assert int(result.sum()) == 6


def test_count_is_exact_if_a_step_removes_several_groups():
    weight, gram = problem(3, out=4, width=600, tokens=900)
    result = remove_groups(weight.float(), gram, ColumnGroups(600, 71), OPTIONS)
    assert int(result.mask[0].sum()) == 529
    assert not result.weight[result.mask].any()


@pytest.mark.parametrize(("count", "kept", "bins"), [(4, 0, 1), (4, 5, 1), (4, 2, 3), (6, 3, 2)])
def test_invalid_numbers_of_groups_raise_value_error(count, kept, bins):
    with pytest.raises(ValueError, match="groups"):
        ColumnGroups(count, kept, bins)


@pytest.mark.parametrize("chosen", [(), (1, 1), (0, 4), (-1, 0), (0, 1)])
def test_invalid_chosen_groups_raise_value_error(chosen):
    with pytest.raises(ValueError, match="needs 2 removed groups, 1 in each bin"):
        ColumnGroups(4, 2, bins=2, chosen=chosen)
    assert ColumnGroups(4, 2, bins=2, chosen=(3, 0)).removed == 2


def test_groups_that_do_not_divide_the_width_raise_value_error():
    weight, gram = problem(0)
    with pytest.raises(ValueError, match="12 columns are not a multiple of 5"):
        remove_groups(weight, gram, ColumnGroups(5, 3), OPTIONS)
