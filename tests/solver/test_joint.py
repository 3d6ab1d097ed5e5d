"""The joint solve: exactness, monotone descent, outlier directions, and edge cases."""

import importlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.solver import Gram, SolverOptions, joint_weights, solve_masked
from tests.helpers.problems import least_squares, problem, quadratic_loss, seeds

joint = importlib.import_module("apt.solver.least_squares")


@pytest.fixture
def iterative(monkeypatch):
    """Use conjugate gradients for every width."""
    monkeypatch.setattr(joint, "_DIRECT", 0)


def random_mask(seed, shape, share=0.5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


@settings(deadline=None, max_examples=12)
@given(seeds, st.integers(1, 5), st.integers(1, 40), st.floats(0, 1), st.booleans())
def test_joint_weights_are_least_squares_on_the_kept_columns(seed, out, width, share, direct):
    weight, gram = problem(seed, out, width)
    damped, mask = gram.damped(0.01), random_mask(seed, (out, width), share)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint, "_DIRECT", width if direct else 0)
        result = joint_weights(weight, damped, mask, tolerance=1e-13)
    expected = least_squares(weight, damped.matrix, mask)
    torch.testing.assert_close(result.weight, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(result.weight[mask], torch.zeros_like(result.weight[mask]))
    torch.testing.assert_close(
        result.loss, quadratic_loss(weight, result.weight, damped.matrix), rtol=1e-5, atol=1e-9
    )


@settings(deadline=None, max_examples=15)
@given(seeds, st.integers(1, 6))
def test_each_step_lowers_the_loss_of_each_row(seed, steps):
    weight, gram = problem(seed, 6, 128)
    damped, mask = gram.damped(0.01), random_mask(seed, (6, 128))
    losses = [
        joint_weights(weight, damped, mask, max_steps=count).loss for count in range(steps + 1)
    ]
    for before, after in itertools.pairwise(losses):
        assert (after <= before * (1 + 1e-9)).all()


@settings(deadline=None, max_examples=15)
@given(seeds, st.floats(0, 1))
def test_solve_masked_is_least_squares_for_the_mask(seed, share):
    target, gram = problem(seed, 4, 20)
    zeros = random_mask(seed, target.shape, share)
    result = solve_masked(target, gram, zeros, SolverOptions(damping=0.01))
    expected = least_squares(target, gram.damped(0.01).matrix, zeros)
    torch.testing.assert_close(result.weight, expected.to(target.dtype), rtol=1e-4, atol=1e-5)
    assert torch.equal(result.mask, zeros)


def test_default_tolerance_is_within_half_a_percent_of_the_optimum():
    weight, gram = problem(5, 64, 256)
    damped, mask = gram.damped(0.01), random_mask(5, (64, 256))
    best = quadratic_loss(weight, least_squares(weight, damped.matrix, mask), damped.matrix).sum()
    result = joint_weights(weight, damped, mask).loss.sum()
    assert best <= result < 1.005 * best


def test_residual_bounds_the_remaining_decrease_of_the_loss(iterative):
    weight, gram = problem(9, 16, 96)
    damped, mask = gram.damped(0.01), random_mask(9, (16, 96))
    optimum = least_squares(weight, damped.matrix, mask)
    best = float(quadratic_loss(weight, optimum, damped.matrix).sum())
    least = float(torch.linalg.eigvalsh(damped.unit.matrix).min())
    certificates = []
    for steps in (1, 4, 16, 64):
        result = joint_weights(weight, damped, mask, tolerance=0, max_steps=steps)
        loss = float(result.loss.sum())
        assert loss - best <= loss * (result.residual**2 / least + 1e-12)
        certificates.append(result.residual)
    assert certificates[-1] < 1e-6 < certificates[0]


def test_dense_and_fully_pruned_rows_are_exact(iterative):
    weight, gram = problem(6, 2, 16)
    mask = torch.tensor([[False], [True]]).expand(2, 16)
    result = joint_weights(weight, gram.damped(0.01), mask, tolerance=1e-12).weight
    torch.testing.assert_close(result[0], weight[0])
    assert not result[1].any()


@pytest.mark.parametrize("width", [8, 64, 200])
def test_preconditioner_is_positive_definite(width):
    _, gram = problem(7, 1, width)
    keep = (~random_mask(7, (1, width))).double()
    precondition = joint._deflation(gram.damped(0.01).unit, keep)
    columns = torch.empty(width, width).double()
    for row, column in zip(torch.eye(width).double(), columns, strict=True):
        precondition(row * keep, column.unsqueeze(0))
    kept = keep[0].bool()
    inside = columns[kept][:, kept]
    torch.testing.assert_close(inside, inside.T)
    assert torch.linalg.eigvalsh(inside).min() > 0
    assert not columns[:, ~kept].any()


def test_outlier_directions_need_few_steps():
    """Eight steps suffice, although six directions are far larger than the others."""
    generator = torch.Generator().manual_seed(8)
    inputs = torch.randn(2048, 256, generator=generator, dtype=torch.float64)
    strong = torch.randn(6, 256, generator=generator, dtype=torch.float64)
    inputs += 10 * torch.randn(2048, 6, generator=generator, dtype=torch.float64) @ strong / 16
    damped = Gram.of(inputs).damped(0.01)
    weight = torch.randn(8, 256, generator=generator, dtype=torch.float64)
    mask = random_mask(8, weight.shape)
    best = quadratic_loss(weight, least_squares(weight, damped.matrix, mask), damped.matrix).sum()
    assert joint_weights(weight, damped, mask, max_steps=8).loss.sum() < 1.01 * best


@pytest.mark.parametrize("width", [32, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_weight_of_any_dtype_is_solved_in_the_dtype_of_the_matrix(width, dtype):
    weight, gram = problem(6, 4, width)
    damped = Gram.from_sum(gram.matrix.float(), gram.tokens).damped(0.01)
    mask, weight = random_mask(6, (4, width)), weight.to(dtype)
    result = joint_weights(weight, damped, mask).weight
    assert torch.equal(result, joint_weights(weight.float(), damped, mask).weight)
