"""Packed models on an accelerator: products in Triton, and matrices that torch expands."""

import pytest
import torch

from apt import devices
from apt.runtime import linear
from apt.runtime.linear import ExpandedMatrix, PackedLinear
from apt.runtime.matrix import encode
from apt.runtime.rounding import encode_rounded

DEVICE = devices.accelerator()
pytestmark = pytest.mark.skipif(DEVICE is None, reason="no accelerator")


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("vectors", [1, 33])
@pytest.mark.parametrize("triton", [True, False])
def test_packed_module_multiplies_on_a_device(kind, vectors, triton, monkeypatch):
    if not triton:
        monkeypatch.setattr(linear, "gpu_matrix", lambda: None)
    elif not devices.runs_triton(DEVICE) or linear.gpu_matrix() is None:
        pytest.skip("needs CUDA, apt-kernels and triton")
    matrix = torch.randn(256, 1000).bfloat16().masked_fill_(torch.rand(256, 1000) < 0.6, 0)
    entry, parts = encode(matrix) if kind == "bfloat16" else encode_rounded(matrix, kind, 128)
    module = PackedLinear(entry, bias=False)
    module.load_state_dict({f"weight_{name}": part for name, part in parts.items()})
    module.prepare()
    dense = module.dense()
    moved = module.to(DEVICE)
    assert isinstance(moved.matrix, ExpandedMatrix) is not triton
    x = torch.randn(vectors, 1000).bfloat16()
    found = moved(x.to(DEVICE)).cpu().float()
    expected = x.float() @ dense.float().T
    assert torch.allclose(found, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
    assert torch.equal(moved.to("cpu").dense(), dense)
