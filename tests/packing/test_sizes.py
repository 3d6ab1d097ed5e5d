"""The sizes of packed matrices before their values are known, against written files."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from apt.layouts.pieces import Piece
from apt.packing.sizes import StoredMatrices, file_bytes, header_bytes
from apt.patterns import IntegerGrid, Unstructured
from apt.runtime.matrix import encode
from apt.runtime.packed_file import CHECKSUMS, checksums
from apt.runtime.rounding import encode_integers
from apt.solver import lowest, rounded

GRIDS = [None, IntegerGrid(8, 64), IntegerGrid(4, 64), IntegerGrid(4, "row")]


def weight_of(rows, columns, share, grid, dtype):
    """A random weight with a share of zeros, on a grid."""
    weight = torch.randn(rows, columns)
    weight[lowest(weight.abs(), Unstructured(share))] = 0
    if grid is not None:
        weight = rounded(weight, torch.eye(columns), grid, dtype, passes=1).weight
    return weight.to(dtype)


def written(folder, weight, grid):
    """The bytes of a file with one packed matrix."""
    entry, parts = encode(weight)
    if grid is not None:
        entry, parts = encode_integers(weight, grid.name, grid.group)
    tensors = {f"w_{part}": tensor for part, tensor in parts.items()}
    metadata = {"format": "pt", CHECKSUMS: checksums(tensors, {"w": entry.record()})}
    save_file(tensors, folder / "w.safetensors", metadata)
    return (folder / "w.safetensors").stat().st_size


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("shape", [(48, 200), (3, 64), (130, 7)])
def test_written_file_is_at_most_the_largest_size(grid, dtype, share, shape, tmp_path):
    torch.manual_seed(0)
    weight = weight_of(*shape, share, grid, dtype)
    matrices = StoredMatrices([Piece("w")], [shape], dtype, digits=6)
    kept = shape[0] * shape[1] - Unstructured(share).required(shape)
    size, rest = written(tmp_path, weight, grid), file_bytes({"format": "pt"})
    coded = matrices.coded(weight, grid)
    assert coded <= matrices.largest(kept, grid)
    if coded < matrices.dense:  # else it is not packed
        assert coded + rest - 200 < size <= coded + rest


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.4, 0.7])
def test_expected_size_is_near_the_coded_one(grid, share):
    torch.manual_seed(1)
    weight = weight_of(256, 512, share, grid, torch.bfloat16)
    matrices = StoredMatrices([Piece("w")], [(256, 512)], torch.bfloat16, digits=6)
    zeros = float((weight == 0).float().mean())
    assert matrices.expected(zeros, grid) == pytest.approx(matrices.coded(weight, grid), rel=0.01)


@given(st.text(min_size=1, max_size=20), st.lists(st.integers(1, 9999), min_size=1, max_size=3))
@settings(max_examples=30)
def test_header_of_a_tensor_has_room(name, shape):
    import json

    entry = {"dtype": "BF16", "shape": shape, "data_offsets": [123456, 234567]}
    text = json.dumps({name: entry}, separators=(",", ":"))
    assert len(text) - 1 <= header_bytes(name, shape, 6)
