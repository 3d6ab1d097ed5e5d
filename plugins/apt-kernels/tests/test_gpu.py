"""Products in Triton against dense ones: on a GPU, or by Triton's interpreter on a processor.

With TRITON_INTERPRET=1 the products run on any machine; without it, they are compiled for GPUs that
need not be there.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="needs triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1"
)


def packed(rows, columns, share, kind, group, seed):
    """A matrix with its zeros in fp32, and its mask, values and scales."""
    draw = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=draw) >= share
    bits = torch.nn.functional.pad(kept, (0, -columns % 8)).view(rows, -1, 8).to(torch.uint8)
    mask = (bits << torch.arange(8, dtype=torch.uint8)).sum(2).to(torch.uint8)
    if kind in ("bfloat16", "float32"):
        weight = torch.randn(rows, columns, generator=draw).to(getattr(torch, kind))
        return weight.float() * kept, mask, weight[kept], None
    most = 127 if kind == "int8" else 7
    whole = torch.randint(-most, most + 1, (rows, columns), generator=draw)
    scales = torch.rand(rows, -(-columns // group), generator=draw).bfloat16()
    dense = whole * scales.float().repeat_interleave(group, 1)[:, :columns] * kept
    values = whole[kept].to(torch.int8)
    if kind == "int4":
        pairs = torch.nn.functional.pad(values + 8, (0, len(values) % 2)).to(torch.uint8)
        values = pairs.view(-1, 2)[:, 0] | (pairs.view(-1, 2)[:, 1] << 4)
    return dense, mask, values, scales


@runs
@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 6),
    columns=st.sampled_from([1, 7, 64, 500, 512, 513, 1200]),
    share=st.sampled_from([0.0, 0.5, 0.7, 1.0]),
    kind=st.sampled_from(["bfloat16", "float32", "int8", "int4"]),
    vectors=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_products_and_expansions_equal_the_dense_matrix(rows, columns, share, kind, vectors, seed):
    from apt_kernels.gpu import GpuMatrix

    dense, *parts = packed(rows, columns, share, kind, 64, seed)
    parts = [None if part is None else part.to(DEVICE) for part in parts]
    matrix = GpuMatrix(columns, *parts, 64 if parts[2] is not None else 0)
    assert torch.equal(matrix.expand(0, rows, torch.float32).cpu(), dense)
    assert torch.equal(matrix.expand(rows // 2, rows, torch.float32).cpu(), dense[rows // 2 :])
    x = torch.randn(vectors, columns, generator=torch.Generator().manual_seed(seed))
    found = matrix.product(x.to(DEVICE)).cpu()
    expected = x.double() @ dense.double().T
    size = (x.double().abs() @ dense.double().abs().T).clamp_min(1e-12)
    assert ((found - expected).abs() / size).max() < 1e-5


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", ["float", "int8", "int4"])
def test_kernels_compile_for_gpus(kind, capability):
    import triton
    from apt_kernels import gpu, triton_kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {
        "mask": "*u8", "values": {"float": "*bf16", "int8": "*i8", "int4": "*u8"}[kind],
        "scales": "*bf16", "starts": "*i64",
    }  # fmt: skip
    sizes = dict.fromkeys(("width", "mask_width", "groups", "parts"), "i32")
    fixed = {"KIND": kind, "GROUP": 0 if kind == "float" else 64, "COLUMNS": gpu.COLUMNS}
    for kernel, own, constants in (
        (
            triton_kernels.multiply,
            {"x": "*bf16", "y": "*fp32", "rows": "i32"},
            {"VECTORS": 4, **fixed},
        ),
        (triton_kernels.expand, {"dense": "*bf16", "first": "i32"}, fixed),
    ):
        types = {**pointers, **own, **sizes, **dict.fromkeys(constants, "constexpr")}
        source = ASTSource(kernel, types, constants)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert len(made.asm["cubin"]) > 1000
