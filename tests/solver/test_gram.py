"""Gram matrices: accumulation, damping, escalation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.solver import NM, Gram, SolverError, SolverOptions, sm
from apt.solver.gram import upper_root
from apt.solver.scaled import NODES, Scaled, positive_inverse
from tests.helpers.problems import problem, seeds


@settings(deadline=None, max_examples=20)
@given(seeds, st.integers(1, 12))
def test_factor_inverts_every_trailing_submatrix(seed, width):
    damped = problem(seed, 1, width)[1].damped(0.01)
    matrix, factor = damped.matrix, damped.factor
    for start in range(width):
        part = factor[start:, start:]
        eye = torch.eye(width - start, dtype=torch.float64)
        torch.testing.assert_close(part.T @ part @ matrix[start:, start:], eye, atol=1e-7, rtol=0)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from([6, 192, 193, 400]))
def test_batch_composition_does_not_change_the_sum(sizes, width):
    inputs = torch.randn(sum(sizes), width, dtype=torch.float64)
    gram = Gram(width, dtype=torch.float64)
    for part in inputs.split(sizes):
        gram.add(part)
        assert torch.equal(gram.matrix, gram.matrix.T)
    assert gram.tokens == len(inputs)
    torch.testing.assert_close(gram.matrix, inputs.T @ inputs)


def test_bf16_inputs_are_summed_in_fp32():
    inputs = torch.randn(512, 8).bfloat16()
    gram = Gram.of(inputs)
    assert gram.matrix.dtype == torch.float32
    torch.testing.assert_close(gram.matrix, inputs.float().T @ inputs.float())


def test_damping_is_a_share_of_the_mean_diagonal():
    inputs = torch.randn(100, 5, dtype=torch.float64)
    result = Gram.of(inputs).damped(0.1).matrix
    mean = inputs.T @ inputs / 100
    expected = mean + 0.1 * mean.diagonal().mean() * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(result, expected)


def test_damping_increases_until_the_factorisation_succeeds():
    gram = Gram.from_sum(torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.05])), 1)
    damped = gram.damped(0.01)
    assert damped.damping == pytest.approx(0.1)
    assert torch.linalg.eigvalsh(damped.matrix).min() > 0


def test_indefinite_gram_matrix_raises_solver_error():
    gram = Gram.from_sum(torch.tensor([[1.0, 50.0], [50.0, 1.0]]), 1)
    with pytest.raises(SolverError, match="not positive definite, even with damping 10 in fp64"):
        gram.damped(0.01)


def test_fp64_is_tried_after_all_dampings_in_fp32(monkeypatch):
    attempts = []

    def refuse_fp32(matrix):
        attempts.append(matrix.dtype)
        return None if matrix.dtype == torch.float32 else upper_root(matrix)

    monkeypatch.setattr("apt.solver.gram.upper_root", refuse_fp32)
    damped = Gram.of(torch.randn(32, 4)).damped(0.01)
    assert attempts == [torch.float32] * 4 + [torch.float64]
    assert (damped.matrix.dtype, damped.damping) == (torch.float64, 0.01)


def test_dead_inputs_need_no_more_damping():
    inputs = torch.randn(64, 6)
    inputs[:, 2] = 0
    damped = Gram.of(inputs).damped(0.01)
    assert damped.damping == 0.01
    assert damped.matrix[2, 2] > 0


@pytest.mark.parametrize("gram", [Gram(4), Gram.of(torch.zeros(8, 4))], ids=["empty", "zero"])
def test_zero_inputs_raise_solver_error(gram):
    with pytest.raises(SolverError, match="zero on all calibration tokens"):
        gram.damped(0.01)


def test_inputs_that_are_not_finite_raise_solver_error():
    inputs = torch.randn(8, 4)
    inputs[3, 1] = float("nan")
    with pytest.raises(SolverError, match="not finite"):
        Gram.of(inputs).damped(0.01)


def test_matmul_precision_medium_does_not_change_the_solution():
    """With bf16 allowed for fp32 products, the result is the same, and the setting is restored."""
    weight, inputs = torch.randn(64, 256), torch.randn(512, 256)
    plain = sm(weight, Gram.of(inputs), NM(2, 4), SolverOptions())
    torch.set_float32_matmul_precision("medium")
    try:
        result = sm(weight, Gram.of(inputs), NM(2, 4), SolverOptions())
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(plain.weight, result.weight)


@settings(deadline=None, max_examples=20)
@given(seeds, st.integers(1, 20), st.integers(1, 5))
def test_solve_multiplies_by_the_inverse(seed, width, rows):
    damped = problem(seed, 1, width)[1].damped(0.01)
    right = torch.randn(rows, width, dtype=torch.float64)
    torch.testing.assert_close(damped.solve(right) @ damped.matrix, right, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("which", ["unit", "balanced"])
def test_scaled_matrix_gives_the_same_loss(which):
    weight, gram = problem(3, 4, 30)
    damped = gram.damped(0.01)
    scaled = getattr(damped, which)
    rows = weight * scaled.scale
    torch.testing.assert_close(
        ((rows @ scaled.matrix) * rows).sum(1), ((weight @ damped.matrix) * weight).sum(1)
    )
    if which == "unit":
        torch.testing.assert_close(scaled.matrix.diagonal(), torch.ones(30).double())
    else:
        assert float(torch.linalg.det(scaled.matrix)) == pytest.approx(1)
    expected = 0.6 * torch.linalg.inv(scaled.matrix + 0.6 * torch.eye(30, dtype=torch.float64))
    torch.testing.assert_close(next(scaled.proximals([0.6])), expected)


@pytest.mark.parametrize("penalty", [0.5, 0.6, 0.61, 0.86, 1.19, 1.2, 1.25, 1.4])
def test_two_inverses_give_the_operators_of_all_penalties(penalty):
    values = torch.cat([torch.zeros(1), torch.logspace(-6, 6, 299)]).double()
    rotation = torch.linalg.qr(torch.randn(300, 300, dtype=torch.float64)).Q
    scaled = Scaled(torch.ones(300), (rotation * values) @ rotation.T)
    for _ in range(2):  # of the second pass no matrix is inverted
        *_, operator = scaled.proximals([0.6, 1.2, penalty])
        result = ((rotation.T @ operator) * rotation.T).sum(1)
        exact = penalty / (values + penalty)
        least = 1e-6 if penalty in NODES else 0.007
        assert float((result - exact).abs().max()) < least
        scaled.matrix.fill_(torch.nan)


def test_total_is_the_sum_of_the_tokens():
    inputs = torch.randn(3, 40, 12, dtype=torch.float64)
    gram = Gram(12, dtype=torch.float64)
    for part in inputs:
        gram.add(part)
    assert torch.allclose(gram.total, inputs.flatten(0, 1).sum(0))
    assert torch.equal(Gram.from_sum(gram.matrix, gram.tokens, gram.total).total, gram.total)
    assert torch.equal(gram.with_missing_tokens(1.0).total, gram.total)
    few = Gram.of(inputs[0, :5])
    assert torch.equal(few.with_missing_tokens(1.0).total, few.total)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(1, 9), st.sampled_from([None, 4]))
def test_variance_is_the_mean_of_the_variances_of_the_samples(samples, length, given):
    """By default each (tokens, in) is a sample; the last one may be shorter."""
    inputs = torch.randn(samples, length, 6, dtype=torch.float64)
    inputs += 3 * torch.randn(samples, 1, 6, dtype=torch.float64)
    gram, rows = Gram(6, dtype=torch.float64), inputs.flatten(0, 1)
    gram.add(rows if given else inputs, given)
    parts = rows.split(given or length)
    expected = sum(part.var(0, unbiased=False) * len(part) for part in parts) / len(rows)
    torch.testing.assert_close(gram.variance, expected)
    assert gram.sample == (given or length)
    several = gram.with_missing_tokens(0.0)
    assert several.sample == gram.sample
    torch.testing.assert_close(several.variance * several.tokens, gram.variance * gram.tokens)


def test_sums_of_two_processes_add_up_to_the_sums_of_one():
    inputs = torch.randn(2, 5, 3, 7, dtype=torch.float64)
    here, there = (Gram.of(part) for part in inputs)
    there.damped(), here.damped()

    def add(*tensors):
        for tensor, other in zip(
            tensors, (there.matrix, there.total, there._deviations), strict=True
        ):
            tensor += other

    here.add_up(add, 30)
    whole = Gram.of(inputs)
    assert (here.tokens, here.sample) == (whole.tokens, whole.sample) == (30, 3)
    torch.testing.assert_close(here.damped().matrix, whole.damped().matrix)
    torch.testing.assert_close(here.total, whole.total)
    torch.testing.assert_close(here.variance, whole.variance)


def test_live_is_the_gram_matrix_of_the_live_inputs():
    inputs = torch.randn(4, 6, 8, dtype=torch.float64)
    inputs[..., [1, 5]] = 0
    gram = Gram.of(inputs)
    live = ~gram.dead
    assert live.logical_not().nonzero().flatten().tolist() == [1, 5]
    others, result = Gram.of(inputs[..., live]), gram.live
    assert gram.live is result  # sites that share an input factorise it once
    for name in ("matrix", "total", "variance"):
        torch.testing.assert_close(getattr(result, name), getattr(others, name))
    assert (result.tokens, result.sample) == (24, 6)
    gram.add(torch.ones(1, 8, dtype=torch.float64))
    assert gram.live.width == 8


@pytest.mark.parametrize("share", [0.001, 0.3])
def test_inverses_are_accurate_for_inputs_with_a_large_common_direction(share):
    draw = torch.Generator().manual_seed(0)
    common = torch.randn(1, 768, generator=draw).abs()
    gram = Gram(768)
    gram.add(common + share * torch.randn(200, 768, generator=draw))
    damped = gram.damped(0.01)
    expected = torch.linalg.inv(damped.matrix.double())
    for inverse, least in ((damped.inverse, 1e-3), (positive_inverse(damped.matrix), 0.1)):
        assert (inverse.double() - expected).norm() / expected.norm() < least


def test_shift_of_the_diagonal_is_undone():
    matrix = problem(3, 1, 12)[1].damped(0.01).balanced.matrix
    shifted = matrix + 0.6 * torch.eye(12)
    scaled = Scaled(torch.ones(12), matrix.clone())
    torch.testing.assert_close(next(scaled.proximals([0.6])), 0.6 * torch.linalg.inv(shifted))
    assert torch.equal(scaled.matrix, matrix)
    scaled = Scaled(torch.ones(12), -matrix)
    with pytest.raises(torch.linalg.LinAlgError):
        next(scaled.proximals([0.6]))
    assert torch.equal(scaled.matrix, -matrix)
