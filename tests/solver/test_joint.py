"""The joint solve: exact, monotone, quick where a few directions dominate, safe at the edges."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.solver import joint_weights
from apt.solver.joint import _deflation
from tests.solver.problems import least_squares, problem, quadratic_loss, seeds


def random_mask(seed, shape, share=0.5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


@settings(deadline=None, max_examples=25)
@given(seeds, st.integers(1, 5), st.integers(1, 40), st.floats(0, 1))
def test_it_is_least_squares_on_the_kept_columns(seed, out, width, share):
    weight, gram = problem(seed, out, width)
    matrix = gram.damped(0.01).matrix
    mask = random_mask(seed, weight.shape, share)
    found = joint_weights(weight, matrix, mask, tolerance=1e-13)
    torch.testing.assert_close(found, least_squares(weight, matrix, mask), rtol=1e-5, atol=1e-7)
    assert torch.equal(found[mask], torch.zeros_like(found[mask]))


@settings(deadline=None, max_examples=15)
@given(seeds, st.integers(1, 6))
def test_every_step_lowers_every_row(seed, steps):
    weight, gram = problem(seed, 6, 64)
    matrix, mask = gram.damped(0.01).matrix, random_mask(seed, (6, 64))
    losses = [
        quadratic_loss(weight, joint_weights(weight, matrix, mask, max_steps=count), matrix)
        for count in range(steps + 1)
    ]
    for before, after in itertools.pairwise(losses):
        assert (after <= before * (1 + 1e-9)).all()


def test_the_default_tolerance_is_within_half_a_percent_of_the_optimum():
    weight, gram = problem(5, 64, 256)
    matrix, mask = gram.damped(0.01).matrix, random_mask(5, (64, 256))
    best = quadratic_loss(weight, least_squares(weight, matrix, mask), matrix).sum()
    found = quadratic_loss(weight, joint_weights(weight, matrix, mask), matrix).sum()
    assert best <= found < 1.005 * best


def test_rows_with_nothing_or_everything_pruned_are_left_alone():
    weight, gram = problem(6, 2, 16)
    mask = torch.tensor([[False], [True]]).expand(2, 16)
    found = joint_weights(weight, gram.damped(0.01).matrix, mask, tolerance=1e-12)
    torch.testing.assert_close(found[0], weight[0])
    assert not found[1].any()


@pytest.mark.parametrize("width", [8, 64, 200])
def test_the_preconditioner_is_positive_definite(width):
    _, gram = problem(7, 1, width)
    matrix = gram.damped(0.01).matrix
    scale = matrix.diagonal().sqrt()
    keep = (~random_mask(7, (1, width))).double()
    precondition = _deflation(matrix / scale / scale[:, None], keep)
    columns = torch.stack([precondition(row * keep)[0] for row in torch.eye(width).double()])
    kept = keep[0].bool()
    inside = columns[kept][:, kept]
    torch.testing.assert_close(inside, inside.T)
    assert torch.linalg.eigvalsh(inside).min() > 0
    assert not columns[:, ~kept].any()


def test_outlier_directions_do_not_slow_it_down():
    """A dozen directions a hundred times larger: as few steps as without them, and a bit."""
    generator = torch.Generator().manual_seed(8)
    inputs = torch.randn(2048, 256, generator=generator, dtype=torch.float64)
    strong = torch.randn(12, 256, generator=generator, dtype=torch.float64)
    inputs += 10 * torch.randn(2048, 12, generator=generator, dtype=torch.float64) @ strong / 16
    matrix = inputs.T @ inputs / 2048
    matrix.diagonal().add_(0.01 * matrix.diagonal().mean())
    weight = torch.randn(8, 256, generator=generator, dtype=torch.float64)
    mask = random_mask(8, weight.shape)
    best = quadratic_loss(weight, least_squares(weight, matrix, mask), matrix).sum()
    found = quadratic_loss(weight, joint_weights(weight, matrix, mask, max_steps=8), matrix).sum()
    assert found < 1.01 * best
