"""Packed models on a GPU, where torch expands each matrix."""

import pytest
import torch

from apt.runtime.linear import PackedLinear
from apt.runtime.matrix import encode
from apt.runtime.rounding import encode_rounded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("vectors", [1, 33])
def test_a_packed_module_multiplies_on_a_gpu(kind, vectors):
    matrix = torch.randn(256, 1000).bfloat16().masked_fill_(torch.rand(256, 1000) < 0.6, 0)
    entry, parts = encode(matrix) if kind == "bfloat16" else encode_rounded(matrix, kind, 128)
    module = PackedLinear(entry, bias=False)
    module.load_state_dict({f"weight_{name}": part for name, part in parts.items()})
    module.prepare()
    dense = module.dense()
    moved = module.to("cuda")
    x = torch.randn(vectors, 1000).bfloat16()
    found = moved(x.cuda()).cpu().float()
    expected = x.float() @ dense.float().T
    assert torch.allclose(found, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
    assert torch.equal(moved.to("cpu").dense(), dense)
