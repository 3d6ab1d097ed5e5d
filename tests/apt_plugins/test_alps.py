"""ALPS: exact patterns, less error than SparseGPT, and the properties its derivation promises."""

import pytest
import torch
from apt_plugins.alps import _growth, alps

from apt.solver import (
    NM,
    Gram,
    SolverError,
    SolverOptions,
    Unstructured,
    meets,
    parse_pattern,
    relative_layer_error,
    ss,
)
from tests.helpers.problems import least_squares, problem, quadratic_loss

PATTERNS = ["1:4", "2:4", "3:4", "0.5", "0.7"]


@pytest.mark.parametrize("text", PATTERNS)
def test_alps_meets_patterns_exactly(text):
    pattern = parse_pattern(text)
    weight, gram = problem(0, 7, 40)
    found = alps(weight, gram, pattern, SolverOptions())
    assert meets(found.weight, pattern)
    assert torch.equal(found.weight == 0, found.mask)
    if isinstance(pattern, NM):
        groups = found.mask.view(7, -1, pattern.m).sum(2)
        assert (groups == pattern.m - pattern.n).all()
    else:
        assert int(found.mask.sum()) == pattern.count(7 * 40)


def test_alps_counts_an_unstructured_pattern_by_row():
    weight, gram = problem(1, 5, 50)
    found = alps(weight, gram, Unstructured(0.33, "row"), SolverOptions())
    assert (found.mask.sum(1) == 17).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("text", PATTERNS)
def test_alps_has_a_lower_loss_than_sparsegpt(text, seed):
    weight, gram = problem(seed, 32, 64)
    error = {
        method: relative_layer_error(
            weight, method(weight, gram, parse_pattern(text), SolverOptions()).weight, gram.matrix
        )
        for method in (alps, ss)
    }
    assert error[alps] < 0.95 * error[ss]


@pytest.mark.parametrize("text", PATTERNS)
def test_weights_of_alps_are_nearly_optimal_for_the_mask(text):
    weight, gram = problem(2, 16, 64)
    matrix = gram.damped(0.01).matrix
    found = alps(weight, gram, parse_pattern(text), SolverOptions())
    best = quadratic_loss(weight, least_squares(weight, matrix, found.mask), matrix)
    loss = quadratic_loss(weight, found.weight, matrix)
    assert (loss >= best * (1 - 1e-9)).all()
    assert loss.sum() < 1.02 * best.sum()


@pytest.mark.parametrize("text", ["2:4", "0.6"])
def test_scales_of_the_inputs_do_not_change_the_mask(text):
    """Inputs s times as large, with weights s times as small, are the same layer."""
    weight, gram = problem(3, 8, 32)
    units = torch.logspace(-2, 2, 32, dtype=torch.float64)
    scaled = Gram.from_sum(gram.matrix * units * units[:, None], gram.tokens)
    options = SolverOptions(damping=0)
    plain = alps(weight, gram, parse_pattern(text), options)
    found = alps(weight / units, scaled, parse_pattern(text), options)
    assert torch.equal(found.mask, plain.mask)
    torch.testing.assert_close(found.weight * units, plain.weight)


@pytest.mark.parametrize("text", PATTERNS)
def test_support_converges_long_before_the_last_iteration(text, monkeypatch):
    weight, gram = problem(4, 32, 64)
    plain = alps(weight, gram, parse_pattern(text), SolverOptions())
    monkeypatch.setattr("apt_plugins.alps._MAX_ITERATIONS", 150)
    found = alps(weight, gram, parse_pattern(text), SolverOptions())
    assert torch.equal(found.weight, plain.weight)


@pytest.mark.parametrize(("changed", "factor"), [(2, 1.3), (0.11, 1.3), (0.1, 1.2), (1e-3, 1.1)])
def test_penalty_grows_with_the_changes_of_the_support(changed, factor):
    assert _growth(changed) == factor


def test_half_precision_weights_are_solved_in_fp32_by_alps():
    weight, gram = problem(5, 8, 32)
    gram = Gram.from_sum(gram.matrix.float(), gram.tokens)
    found = alps(weight.bfloat16(), gram, NM(2, 4), SolverOptions())
    assert found.weight.dtype == torch.bfloat16
    assert found.damping == 0.01
    assert meets(found.weight, NM(2, 4))


def test_dead_inputs_and_empty_layers_are_finite():
    inputs = torch.randn(64, 8)
    inputs[:, 2] = 0
    weight, gram = torch.randn(4, 8), Gram.of(inputs)
    assert alps(weight, gram, NM(2, 4), SolverOptions()).weight.isfinite().all()
    assert not alps(weight, gram, Unstructured(0.999), SolverOptions()).weight.any()


def test_zero_gram_matrix_is_an_error():
    with pytest.raises(SolverError, match="zero on all calibration tokens"):
        alps(torch.randn(2, 4), Gram(4), NM(2, 4), SolverOptions())
