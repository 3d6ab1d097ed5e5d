"""The mask search: exact patterns, lower errors than SM, monotone in effort."""

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
def test_admm_meets_n_m_exactly(seed, pattern, groups, effort):
    n, m = pattern
    weight, gram = problem(seed, 3, groups * m)
    solution = admm(weight, gram, NM(n, m), SolverOptions(effort=effort))
    assert meets(solution.weight, NM(n, m))
    assert (solution.mask.view(-1, m).sum(1) == m - n).all()


@settings(deadline=None, max_examples=20)
@given(seeds, st.floats(0.05, 0.95), st.sampled_from(["row", "layer"]))
def test_admm_meets_unstructured_counts_exactly(seed, sparsity, per):
    weight, gram = problem(seed, 5, 24)
    pattern = Unstructured(sparsity, per)
    solution = admm(weight, gram, pattern, SolverOptions())
    if per == "row":
        assert (solution.mask.sum(1) == pattern.count(24)).all()
    else:
        assert int(solution.mask.sum()) == pattern.count(120)


@pytest.mark.parametrize("pattern", ["0.5", "0.7", "2:4", "1:4"])
def test_effort_fast_has_a_lower_error_than_sm(pattern):
    weight, gram = problem(11, 96, 128, tokens=1024)
    wanted = parse_pattern(pattern)
    options = SolverOptions(effort="fast")
    result = error(weight, gram, admm(weight, gram, wanted, options))
    assert result < 0.97 * error(weight, gram, sm(weight, gram, wanted, options))


@settings(deadline=None, max_examples=10)
@given(seeds, st.sampled_from(["0.5", "0.7", "2:4", "3:4"]))
def test_more_effort_never_increases_the_loss(seed, pattern):
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
def test_bf16_products_give_the_same_error(pattern, effort, monkeypatch):
    """The mean error over several layers: on one layer the errors differ by up to a percent."""
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
def test_search_from_a_mask_never_increases_its_loss(seed, pattern):
    weight, gram = problem(seed, 12, 40)
    wanted, options = parse_pattern(pattern), SolverOptions(effort="fast")
    matrix = gram.damped(0.01).matrix
    given_mask = lowest(weight.abs(), wanted)
    before = quadratic_loss(weight, least_squares(weight, matrix, given_mask), matrix)
    solution = admm(weight, gram, wanted, options, given_mask)
    after = quadratic_loss(weight, solution.weight, matrix)
    assert float(after.sum()) <= float(before.sum()) * (1 + 1e-9)
    assert meets(solution.weight, wanted)


def test_effort_best_halves_the_excess_loss_of_sm():
    """The optimum is known from all 216 masks of a row with three groups of 2:4."""
    weight, gram = problem(12, 40, 12)
    matrix = gram.damped(0.01).matrix
    solution = admm(weight, gram, NM(2, 4), SolverOptions(effort="best"))
    result = quadratic_loss(weight, solution.weight, matrix)
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
    assert (result >= best * (1 - 1e-9)).all()
    sequential = quadratic_loss(weight, sm(weight, gram, NM(2, 4), SolverOptions()).weight, matrix)
    excess, reference = (float((loss - best).sum()) for loss in (result, sequential))
    assert excess < 0.5 * reference


def test_admm_keeps_the_dtype_of_bf16_weights():
    weight, inputs = torch.randn(8, 32).bfloat16(), torch.randn(256, 32)
    solution = admm(weight, Gram.of(inputs), NM(2, 4), SolverOptions())
    assert solution.weight.dtype == torch.bfloat16
    assert not solution.weight[solution.mask].any()


def test_admm_refuses_a_width_not_divisible_by_m():
    weight, gram = problem(1, 2, 6)
    with pytest.raises(SolverError, match="not a multiple of 4"):
        admm(weight, gram, NM(2, 4), SolverOptions())


def test_unknown_effort_raises_solver_error():
    weight, gram = problem(1, 2, 8)
    with pytest.raises(SolverError, match="'most' is none of fast, default, best"):
        admm(weight, gram, NM(2, 4), SolverOptions(effort="most"))


@pytest.mark.parametrize("effort", EFFORTS)
def test_tolerance_applies_to_every_effort(effort):
    weight, gram = problem(5, 6, 128)
    result = admm(weight, gram, NM(2, 4), SolverOptions(effort=effort, tolerance=1e-12))
    exact = least_squares(weight, gram.damped(0.01).matrix, result.mask)
    torch.testing.assert_close(result.weight, exact, rtol=1e-4, atol=1e-4)
