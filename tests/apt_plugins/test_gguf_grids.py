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

BY_TYPE = {grid.type: grid for grid in GRIDS}
CASES = [
    pytest.param(grid, columns, id=f"{grid.name}-{columns}")
    for columns in (256, 512, 576)
    for grid in grids_for(columns)
]
SIZES = {"tiny": 1e-8, "large": 1e4, "zeros": 0.0}
KINDS = ("normal", "heavy tails", "one sign", *SIZES)

# The weighted squared error of llama.cpp's quantiser (ggml 0.25.3) with the same
# importance, relative to the weighted sum of squares, for `weights` (64, 512).
LLAMA_CPP = {
    "q8_0": (2.811e-05, 7.092e-05),
    "q6_K": (0.0002507, 0.000613),
    "q5_1": (0.0009286, 0.001828),
    "q5_K": (0.001073, 0.002131),
    "q5_0": (0.001422, 0.003985),
    "q4_1": (0.003927, 0.007565),
    "q4_K": (0.004064, 0.007938),
    "q4_0": (0.00586, 0.01437),
    "iq4_nl": (0.004808, 0.008805),
    "mxfp4": (0.01302, 0.02012),
    "iq4_xs": (0.004921, 0.008997),
    "q3_K": (0.01742, 0.0277),
    "q2_K": (0.05244, 0.06671),
}


def weights(kind, rows, columns, seed=0):
    draw = torch.Generator().manual_seed(seed)
    result = torch.randn(rows, columns, generator=draw)
    if kind == "heavy tails":
        result = result / torch.randn(rows, columns, generator=draw).abs().clamp_min(0.1)
    result = result * SIZES.get(kind, 0.02)
    return result.abs() + 0.01 if kind == "one sign" else result


def with_special_rows(weight, seed=0):
    """The weights after a zero row, two constant rows and two pruned rows."""
    draw = torch.Generator().manual_seed(seed)
    special = torch.zeros(3, weight.shape[1])
    special[1], special[2] = 0.03, -0.03
    return torch.cat(
        [special, weight[:2] * (torch.rand(weight[:2].shape, generator=draw) > 0.5), weight]
    )


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
    """The weighted squared error of each row."""
    return ((result.double() - weight) ** 2 * importance).sum(1)


def assert_exact(weight, matrix, grid):
    result = rounded(weight, matrix, grid)
    data = grid.encoded(result.points, result.indices)
    assert data.dtype == torch.uint8
    assert data.shape == (len(weight), grid.row_bytes(weight.shape[1]))
    assert torch.equal(decoded(data, grid), result.weight)
    return result.weight


@pytest.mark.parametrize(("grid", "columns"), CASES)
def test_bytes_decode_to_the_rounded_weights(grid, columns):
    weight = torch.cat([with_special_rows(weights(kind, 4, columns)) for kind in KINDS])
    result = assert_exact(weight, matrix_of(columns), grid)
    if grid.holds_zero:
        assert not result[weight == 0].any()
    zero_rows = (weight == 0).all(1)
    assert zero_rows.sum() > len(KINDS)
    assert not result[zero_rows].any()


@settings(deadline=None, max_examples=30)
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
    "type", [Type.Q8_0, Type.Q5_1, Type.Q5_0, Type.Q4_1, Type.Q4_0, Type.MXFP4]
)
def test_error_of_each_row_is_at_most_that_of_the_package_gguf(type):
    grid, importance = BY_TYPE[type], importances(576)
    kinds = ("normal", "heavy tails", "one sign", "large")
    weight = torch.cat([with_special_rows(weights(kind, 8, 576)) for kind in kinds])
    theirs = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), type), type))
    ours = decoded(encode(weight, grid, importance), grid)
    most = error(weight, theirs, importance)
    assert (error(weight, ours, importance) <= most * (1 + 1e-6)).all()


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_error_is_less_than_that_of_llama_cpp(grid):
    importance = importances(512)
    for kind, bound in zip(("normal", "heavy tails"), LLAMA_CPP[grid.name], strict=True):
        weight = weights(kind, 64, 512)
        ours = error(weight, decoded(encode(weight, grid, importance), grid), importance).sum()
        assert ours < 0.96 * bound * error(weight, torch.zeros(1), importance).sum()


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_values_of_a_type_hardly_change_when_they_are_encoded_again(grid):
    weight, importance = weights("normal", 16, 512), torch.ones(512)
    once = decoded(encode(weight, grid), grid)
    again = decoded(encode(once, grid), grid)
    first = error(weight, once, importance).sum()
    assert error(once, again, importance).sum() <= 0.04 * first


def test_matrices_have_whole_blocks():
    assert len(GRIDS) == len({grid.name for grid in GRIDS}) == 13
    assert grids_for(512) == GRIDS
    assert {grid.block for grid in grids_for(576)} == {32}
    assert grids_for(100) == ()
    assert BY_TYPE[Type.Q4_K].name == "q4_K"
    assert BY_TYPE[Type.Q4_K].row_bytes(512) == 288


def test_columns_without_importance_are_rounded_too():
    weight, importance = weights("normal", 8, 512), torch.zeros(512)
    importance[:5] = 1
    for grid in GRIDS:
        for weighting in (importance, torch.zeros(512)):
            result = decoded(encode(weight, grid, weighting), grid)
            assert error(weight, result, torch.ones(512)).sum() < 0.3 * weight.square().sum()
