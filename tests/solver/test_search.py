"""The mask search: patterns met, better than what it is measured against, monotone in effort."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.solver import (
    EFFORTS,
    NM,
    Gram,
    SolverError,
    SolverOptions,
    Unstructured,
    admm,
    lowest,
    meets,
    parse_pattern,
    relative_layer_error,
    sm,
)
from tests.helpers.problems import (
    group_patterns,
    least_squares,
    problem,
    quadratic_loss,
    removal_sets,
    seeds,
)


def error(weight, gram, solution):
    return relative_layer_error(weight, solution.weight, gram.matrix)


@settings(deadline=None, max_examples=20)
@given(seeds, group_patterns, st.integers(1, 5), st.sampled_from(EFFORTS))
def test_groups_are_met_exactly(seed, pattern, groups, effort):
    n, m = pattern
    weight, gram = problem(seed, 3, groups * m)
    solution = admm(weight, gram, NM(n, m), SolverOptions(effort=effort))
    assert meets(solution.weight, NM(n, m))
    assert (solution.mask.view(-1, m).sum(1) == m - n).all()


@settings(deadline=None, max_examples=20)
@given(seeds, st.floats(0.05, 0.95), st.sampled_from(["row", "layer"]))
def test_counts_are_met_exactly(seed, sparsity, per):
    weight, gram = problem(seed, 5, 24)
    pattern = Unstructured(sparsity, per)
    solution = admm(weight, gram, pattern, SolverOptions())
    if per == "row":
        assert (solution.mask.sum(1) == pattern.count(24)).all()
    else:
        assert int(solution.mask.sum()) == pattern.count(120)


@pytest.mark.parametrize("pattern", ["0.5", "0.7", "2:4", "1:4"])
def test_even_the_least_effort_beats_the_sequential_mask(pattern):
    weight, gram = problem(11, 96, 128, tokens=1024)
    wanted = parse_pattern(pattern)
    options = SolverOptions(effort="fast")
    found = error(weight, gram, admm(weight, gram, wanted, options))
    assert found < 0.97 * error(weight, gram, sm(weight, gram, wanted, options))


@settings(deadline=None, max_examples=10)
@given(seeds, st.sampled_from(["0.5", "0.7", "2:4", "3:4"]))
def test_more_effort_never_gives_a_worse_layer(seed, pattern):
    weight, gram = problem(seed, 24, 48)
    matrix = gram.damped(0.01).matrix
    losses = [
        quadratic_loss(
            weight,
            admm(weight, gram, parse_pattern(pattern), SolverOptions(effort=effort)).weight,
            matrix,
        )
        for effort in EFFORTS
    ]
    for less, more in pairwise(losses):
        assert float(more.sum()) <= float(less.sum()) * (1 + 1e-9)
        if ":" in pattern:
            assert (more <= less * (1 + 1e-9)).all()


@pytest.mark.parametrize(
    ("pattern", "effort"), [("0.5", "fast"), ("2:4", "default"), ("0.7", "best"), ("2:4", "best")]
)
def test_products_of_few_bits_find_as_good_a_mask(pattern, effort, monkeypatch):
    """On average: on one layer either of them is better by up to a percent."""
    errors, options = torch.zeros(2), SolverOptions(effort=effort)
    monkeypatch.setattr("apt.solver.scaled.BF16_WIDTH", 256)
    for seed in range(13, 17):
        weight, exact = problem(seed, 96, 256, tokens=1024)
        for few in (False, True):
            monkeypatch.setattr("apt.solver.scaled.multiplies_bf16", lambda device, few=few: few)
            gram = Gram.from_sum(exact.matrix.float(), exact.tokens)
            proximal = next(gram.damped(0.01).balanced.proximals([0.5]))
            assert proximal.dtype == (torch.bfloat16 if few else torch.float32)
            solution = admm(weight.float(), gram, parse_pattern(pattern), options)
            errors[int(few)] += error(weight.float(), gram, solution)
    assert errors[0] != errors[1]
    assert errors[1] < 1.01 * errors[0]
    assert next(exact.damped(0.01).balanced.proximals([0.5])).dtype == torch.float64


@settings(deadline=None, max_examples=10)
@given(seeds, st.sampled_from(["0.6", "2:4"]))
def test_a_warm_start_is_never_made_worse(seed, pattern):
    weight, gram = problem(seed, 12, 40)
    wanted, options = parse_pattern(pattern), SolverOptions(effort="fast")
    matrix = gram.damped(0.01).matrix
    given_mask = lowest(weight.abs(), wanted)
    before = quadratic_loss(weight, least_squares(weight, matrix, given_mask), matrix)
    solution = admm(weight, gram, wanted, options, given_mask)
    after = quadratic_loss(weight, solution.weight, matrix)
    assert float(after.sum()) <= float(before.sum()) * (1 + 1e-9)
    assert meets(solution.weight, wanted)


def test_it_comes_near_the_best_of_all_masks():
    """Every mask of every row tried, at 2:4 with three groups: most of the way from SM's there."""
    weight, gram = problem(12, 40, 12)
    matrix = gram.damped(0.01).matrix
    solution = admm(weight, gram, NM(2, 4), SolverOptions(effort="best"))
    found = quadratic_loss(weight, solution.weight, matrix)
    groups = removal_sets(4, 2)
    masks = torch.stack(
        [torch.cat([a, b, c]) for a in groups for b in groups for c in groups]
    )  # (216, 12)
    best = torch.full((40,), float("inf"), dtype=torch.float64)
    inverse = torch.linalg.inv(matrix)
    for mask in masks:
        pruned = weight[:, mask]
        joint = torch.linalg.inv(inverse[mask][:, mask])
        best = torch.minimum(best, 0.5 * ((pruned @ joint) * pruned).sum(1))
    assert (found >= best * (1 - 1e-9)).all()
    sequential = quadratic_loss(weight, sm(weight, gram, NM(2, 4), SolverOptions()).weight, matrix)
    excess, reference = (float((loss - best).sum()) for loss in (found, sequential))
    assert excess < 0.5 * reference


def test_half_precision_weights_come_back_as_they_were():
    weight, inputs = torch.randn(8, 32).bfloat16(), torch.randn(256, 32)
    solution = admm(weight, Gram.of(inputs), NM(2, 4), SolverOptions())
    assert solution.weight.dtype == torch.bfloat16
    assert not solution.weight[solution.mask].any()


def test_a_width_that_groups_do_not_divide_is_an_error():
    weight, gram = problem(1, 2, 6)
    with pytest.raises(SolverError, match="not a multiple of 4"):
        admm(weight, gram, NM(2, 4), SolverOptions())


def test_an_unknown_effort_is_an_error():
    weight, gram = problem(1, 2, 8)
    with pytest.raises(SolverError, match="'most' is none of fast, default, best"):
        admm(weight, gram, NM(2, 4), SolverOptions(effort="most"))


@pytest.mark.parametrize("effort", EFFORTS)
def test_the_tolerance_holds_for_every_effort(effort):
    weight, gram = problem(5, 6, 128)
    found = admm(weight, gram, NM(2, 4), SolverOptions(effort=effort, tolerance=1e-12))
    exact = least_squares(weight, gram.damped(0.01).matrix, found.mask)
    torch.testing.assert_close(found.weight, exact, rtol=1e-4, atol=1e-4)
