"""The times of products: the matrices that are measured, and the shares between measured ones."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from apt.packing import times
from apt.packing.times import MatrixKind, PackedKind, ProductTimes, packed_linear, product_times
from apt.patterns import IntegerGrid
from apt.runtime.linear import kernels

INT4, INT8 = IntegerGrid(4, 64), IntegerGrid(8, 64)
KIND = MatrixKind(96, 128, in_call=False)
shares = st.integers(0, 2**20).map(lambda weights: weights / 2**20)


def linear():
    torch.manual_seed(0)
    return nn.Linear(128, 96, dtype=torch.bfloat16).requires_grad_(False).eval()


@pytest.mark.parametrize("grid", [None, INT8, INT4])
@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.7])
def test_packed_matrix_has_the_zeros_and_nearly_the_products(grid, zeros):
    plain, x = linear(), torch.randn(1, 128).bfloat16()
    packed = packed_linear(plain, PackedKind(grid, zeros))
    dense = packed.weight
    # A level with few bits has zeros without a pattern: a tenth of the weights of int4.
    least, most = zeros - 0.02, max(zeros + 0.02, 0.25 if grid == INT4 else 0)
    assert least <= times.share_of_zeros(packed) <= most
    assert times.share_of_zeros(packed) == pytest.approx(float((dense == 0).float().mean()))
    kept = dense != 0
    step = 0 if grid is None else float(plain.weight.abs().max()) / grid.most
    assert float((dense - plain.weight)[kept].abs().max()) <= step
    expected = nn.functional.linear(x.float(), dense.float(), plain.bias.float())
    assert torch.allclose(packed(x).float(), expected, atol=0.05)
    assert packed.entry.values == (grid.name if grid else "bfloat16")


@pytest.mark.parametrize("in_call", [False, True])
def test_all_kinds_are_measured_at_all_levels(in_call):
    if in_call and kernels() is None:
        pytest.skip("needs apt-kernels")
    kinds = {MatrixKind(96, 128, in_call): 3, MatrixKind(64, 192, in_call): 1}
    packed = [PackedKind(None, 0.5), PackedKind(INT4, 0.0), PackedKind(INT4, 0.5)]
    found = product_times(kinds, packed, torch.bfloat16)
    assert found.dense.keys() == kinds.keys()
    assert found.packed.keys() == {(kind, grid) for kind in kinds for grid in (None, INT4)}
    for kind in kinds:
        assert 0 < found.dense[kind] < math.inf
        assert [len(found.packed[kind, grid]) for grid in (None, INT4)] == [1, 2]
        assert all(0 < time < math.inf for _, time in found.packed[kind, INT4])


def test_large_matrix_is_measured_by_a_part_of_its_rows(monkeypatch):
    monkeypatch.setattr(times, "_WEIGHTS", 32 * 128)
    assert times._random_linear(KIND, torch.bfloat16).out_features == 32
    clock = iter(range(100))
    monkeypatch.setattr(times, "clock", lambda: next(clock))  # each product takes a second
    found = product_times({KIND: 1}, [], torch.bfloat16)
    assert found.dense[KIND] == 3e9  # of a third of the rows


@given(st.lists(st.tuples(shares, st.floats(1, 1e6)), min_size=1, unique_by=lambda x: x[0]), shares)
def test_time_lies_between_those_of_measured_shares(points, zeros):
    found = ProductTimes({}, {(KIND, None): points})
    below = [each for each in points if each[0] <= zeros] or [min(points)]
    above = [each for each in points if each[0] >= zeros] or [max(points)]
    ends = sorted((max(below)[1], min(above)[1]))
    assert ends[0] * (1 - 1e-9) <= found.packed_time(KIND, None, zeros) <= ends[1] * (1 + 1e-9)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_time_of_a_measured_share_is_the_measured_one(place):
    points = [(0.5, 30.0), (0.1, 70.0), (0.3, 50.0)]
    found = ProductTimes({}, {(KIND, INT8): points})
    assert found.packed_time(KIND, INT8, points[place][0]) == points[place][1]
