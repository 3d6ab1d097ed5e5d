"""Rounding to integers: the grid, the zeros, and the compensation by later columns."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.runtime.matrix import decode
from apt.runtime.rounding import encode_integers
from apt.solver import IntegerGrid, rounded
from tests.helpers.problems import problem, quadratic_loss, seeds

GRIDS = st.builds(IntegerGrid, st.sampled_from([4, 8]), st.sampled_from([64, 128]))


def pruned_problem(seed, out, width, share=0.5):
    weight, gram = problem(seed, out, width)
    matrix = gram.damped(0.05).matrix.float()
    draw = torch.Generator().manual_seed(seed)
    return weight.float() * (torch.rand(out, width, generator=draw) >= share), matrix


def to_nearest(weight, result, grid):
    """Each weight rounded to the nearest multiple of the scale of ``result``."""
    _, parts = encode_integers(result, f"int{grid.bits}", grid.group)
    spread = parts["scales"].repeat_interleave(grid.group, 1)[:, : weight.shape[1]]
    return (weight / spread).round().clamp(-grid.most, grid.most) * spread


@settings(deadline=None, max_examples=20)
@given(
    seed=seeds, out=st.integers(1, 12), width=st.integers(1, 200), grid=GRIDS,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    share=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)  # fmt: skip
def test_rounded_weights_are_integers_times_scales_and_keep_zeros(
    seed, out, width, grid, dtype, share
):
    weight, matrix = pruned_problem(seed, out, width, share)
    result = rounded(weight.to(dtype).float(), matrix, grid, dtype).weight
    assert torch.equal(result.to(dtype).float(), result)
    assert (result[weight == 0] == 0).all()
    again = encode_integers(result.to(dtype), f"int{grid.bits}", grid.group)
    assert again is not None  # packing finds the integers again, without being told the scales
    assert torch.equal(decode(*again), result.to(dtype) + 0)


@settings(deadline=None, max_examples=12)
@given(seed=seeds, bits=st.sampled_from([4, 8]))
def test_further_passes_never_increase_the_loss_of_a_row(seed, bits):
    weight, matrix = pruned_problem(seed, 6, 150)
    losses = [
        quadratic_loss(weight, rounded(weight, matrix, IntegerGrid(bits), passes=n).weight, matrix)
        for n in (1, 2, 3, 5)
    ]
    for before, after in pairwise(losses):
        assert (after <= before * (1 + 1e-4) + 1e-9).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_rounded_weights_lose_less_than_nearest_integers(bits):
    weight, matrix = pruned_problem(3, 64, 256)
    grid = IntegerGrid(bits)
    result = rounded(weight, matrix, grid).weight
    nearest = to_nearest(weight, result, grid)
    joint, plain = (float(quadratic_loss(weight, each, matrix).sum()) for each in (result, nearest))
    assert joint < 0.75 * plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_relative_rounding_error_does_not_depend_on_the_size(dtype):
    weight, matrix = pruned_problem(3, 8, 128)
    errors = []
    for size in (1e-2, 1e-4):
        small = (weight * size).to(dtype).float()
        result = rounded(small, matrix, IntegerGrid(8), dtype).weight
        errors.append(float(quadratic_loss(small, result, matrix).sum()) / size**2)
    assert errors[1] < 1.5 * errors[0]


def test_indices_of_levels_give_the_weights_and_their_zeros():
    weight, matrix = pruned_problem(5, 8, 150)
    result = rounded(weight, matrix, IntegerGrid(4, 64))
    for column in range(weight.shape[1]):
        points = result.points.points(result.indices[:, column], column)
        assert torch.equal(points, result.weight[:, column])
