"""The types of GGUF as grids: files decode to the points, and scales are well chosen."""

import gguf
import pytest
import torch
from apt_plugins.gguf_files.grids import GRIDS, encode, grids_for
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.solver import rounded
from tests.helpers.problems import seeds

CASES = [
    pytest.param(grid, columns, id=f"{grid.name}-{columns}")
    for columns in (256, 512, 576)
    for grid in grids_for(columns)
]
KINDS = ("normal", "heavy tails", "tiny", "large", "one sign", "zeros")


def weights(kind, rows, columns, seed=0):
    """Random weights with a zero row, a constant row and a pruned part."""
    draw = torch.Generator().manual_seed(seed)
    result = torch.randn(rows, columns, generator=draw)
    if kind == "heavy tails":
        result = result / torch.randn(rows, columns, generator=draw).abs().clamp_min(0.02)
    result = result * {"tiny": 1e-8, "large": 1e4, "zeros": 0.0}.get(kind, 0.02)
    if kind == "one sign":
        result = result.abs() + 0.01
    result[0], result[1], result[2] = 0, 0.03, -0.03
    result[3:6] *= torch.rand(3, columns, generator=draw) > 0.5
    return result


def importances(columns, seed=0):
    return torch.rand(columns, generator=torch.Generator().manual_seed(seed + 1)) ** 3 + 1e-3


def matrix_of(columns, seed=0):
    """A damped Gram matrix (columns, columns) of correlated inputs."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, 64, generator=draw) @ torch.randn(64, columns, generator=draw)
    inputs = (mixed + 8 * torch.randn(columns, columns, generator=draw)) / columns
    return inputs.T @ inputs + 0.01 * torch.eye(columns)


def decoded(data, grid):
    return torch.from_numpy(gguf.dequantize(data.numpy(), grid.type))


def error(weight, result, importance):
    return float(((result.double() - weight) ** 2 * importance).sum())


def assert_exact(weight, matrix, grid):
    result = rounded(weight, matrix, grid)
    data = grid.encoded(result.points, result.indices)
    assert data.dtype == torch.uint8
    assert data.shape == (len(weight), grid.row_bytes(weight.shape[1]))
    assert torch.equal(decoded(data, grid), result.weight)
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("grid", "columns"), CASES)
def test_bytes_decode_to_the_rounded_weights(grid, columns, kind):
    weight = weights(kind, 12, columns)
    result = assert_exact(weight, matrix_of(columns), grid)
    if grid.holds_zero:
        assert not result.weight[weight == 0].any()
    assert not result.weight[0].any()


@settings(deadline=None, max_examples=40)
@given(
    seed=seeds, grid=st.sampled_from(GRIDS), blocks=st.integers(1, 3), rows=st.integers(1, 5),
    exponent=st.integers(-40, 20), tails=st.integers(1, 5), shift=st.sampled_from([-1, 0, 0, 0, 1]),
    share=st.sampled_from([0.0, 0.0, 0.5, 0.95]),
)  # fmt: skip
def test_bytes_decode_exactly_for_all_sizes_of_weights(
    seed, grid, blocks, rows, exponent, tails, shift, share
):
    draw = torch.Generator().manual_seed(seed)
    columns = blocks * grid.block
    weight = (torch.randn(rows, columns, generator=draw) ** tails + shift) * 2.0**exponent
    weight *= torch.rand(rows, columns, generator=draw) >= share
    assert_exact(weight, matrix_of(columns, seed), grid)


@pytest.mark.parametrize(
    "grid",
    [
        g
        for g in GRIDS
        if g.type in (Type.Q8_0, Type.Q5_1, Type.Q5_0, Type.Q4_1, Type.Q4_0, Type.MXFP4)
    ],
    ids=lambda grid: grid.name,
)
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "large", "one sign"])
def test_error_is_at_most_that_of_the_package_gguf(grid, kind):
    weight, importance = weights(kind, 32, 576), importances(576)
    theirs = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), grid.type), grid.type))
    ours = decoded(encode(weight, grid, importance), grid)
    for row in range(len(weight)):
        most = error(weight[row], theirs[row], importance)
        assert error(weight[row], ours[row], importance) <= most * (1 + 1e-6)
