"""A block of LLaMA in one call, for every instruction set, against the same block in fp64."""

import pytest
import torch
from apt_kernels import LEVEL, Block, DenseMatrix, available, library
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention, silu

pytestmark = pytest.mark.skipif(not available(), reason="installed without a compiler")
HERE = library.SERVED
EPSILON, SCALING = 1e-5, 0.3


def norm(x, weight):
    return weight * x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt()


def turned(heads, cosines, sines):
    first, second = heads.chunk(2, -1)
    return heads * cosines + torch.cat([-second, first], -1) * sines


def reference(matrices, vectors, width, x, angles, keys, values, start=0):
    """The output, the key and the value, in fp64."""
    keys, values = keys[:, start:], values[:, start:]
    given = norm(x, vectors["input_norm"])
    q, k, v = ((matrices[n] @ given + vectors.get(f"{n}_bias", 0)).view(-1, width) for n in "qkv")
    q, k = (
        turned(norm(h, vectors[f"{n}_norm"]) if f"{n}_norm" in vectors else h, *angles)
        for n, h in (("q", q), ("k", k))
    )
    share = len(q) // len(k)
    all_keys, all_values = (
        torch.cat([t[:, :-1], new[:, None]], 1).repeat_interleave(share, 0)
        for t, new in ((keys, k), (values, v))
    )
    seen = scaled_dot_product_attention(q[:, None], all_keys, all_values, scale=SCALING)
    x = x + matrices["o"] @ seen.flatten() + vectors.get("o_bias", 0)
    given = norm(x, vectors["output_norm"])
    middle = silu(matrices["gate"] @ given) * (matrices["up"] @ given)
    return x + matrices["down"] @ middle, k, v


def random_block(draw, hidden, middle, kv_heads, share, width, more):
    inner, shared = kv_heads * share * width, kv_heads * width
    shapes = {
        "q": (inner, hidden), "k": (shared, hidden), "v": (shared, hidden), "o": (hidden, inner),
        "gate": (middle, hidden), "up": (middle, hidden), "down": (hidden, middle),
    }  # fmt: skip
    matrices = {n: torch.randn(s, generator=draw) / s[1] ** 0.5 for n, s in shapes.items()}
    sizes = {"input_norm": hidden, "output_norm": hidden}
    if more:
        sizes |= {"q_norm": width, "k_norm": width, "q_bias": inner, "k_bias": shared}
        sizes |= {"v_bias": shared, "o_bias": hidden}
    return matrices, {n: torch.randn(s, generator=draw) for n, s in sizes.items()}


def kernels_of(matrices, level):
    found = {name: DenseMatrix(matrix) for name, matrix in matrices.items()}
    for kernel in found.values():
        kernel.use(level)
    return found


@pytest.mark.parametrize("level", HERE)
@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 5), one_position=st.booleans(), padded=st.booleans(),
    kv_heads=st.integers(1, 3), share=st.integers(1, 3), half_width=st.sampled_from([32, 64, 96]),
    length=st.integers(1, 40), room=st.integers(0, 5), more=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_block_equals_the_reference_in_torch(
    level, batch, one_position, padded, kv_heads, share, half_width, length, room, more, dtype, seed
):
    draw, width = torch.Generator().manual_seed(seed), 2 * half_width
    matrices, vectors = random_block(draw, 128, 192, kv_heads, share, width, more)
    matrices = {name: matrix.to(dtype) for name, matrix in matrices.items()}
    vectors = {name: vector.to(dtype) for name, vector in vectors.items()}
    block = Block(kernels_of(matrices, level), vectors, width, EPSILON, SCALING)
    positions = 1 if one_position else batch
    x, *angles = (
        torch.randn(count, n, generator=draw).to(dtype)
        for count, n in ((batch, 128), (positions, width), (positions, width))
    )
    caches = [
        torch.randn(batch, kv_heads, length + room, width, generator=draw).to(dtype)
        for _ in range(2)
    ]
    before = [cache.clone() for cache in caches]
    keys, values = (cache[:, :, :length] for cache in caches)
    exact = (
        {n: m.double() for n, m in matrices.items()},
        {n: v.double() for n, v in vectors.items()},
    )
    starts = torch.randint(length, (batch,), generator=draw) if padded else None
    expected = [
        reference(*exact, width, one, turn, *cache, start)
        for one, turn, cache, start in zip(
            x.double(),
            zip(*(t.double().expand(batch, -1) for t in angles), strict=True),
            zip(keys.double(), values.double(), strict=True),
            [0] * batch if starts is None else starts.tolist(),
            strict=True,
        )
    ]
    found = block.step(x, *angles, keys, values, starts)
    error = 1e-4 if dtype == torch.float32 else 0.1
    last = (found, keys[:, :, -1], values[:, :, -1])
    for one, other in zip(last, map(torch.stack, zip(*expected, strict=True)), strict=True):
        assert float((one - other).norm()) < error * float(other.norm())
    for cache, was in zip(caches, before, strict=True):  # and nothing else was written
        assert torch.equal(cache[:, :, : length - 1], was[:, :, : length - 1])
        assert torch.equal(cache[:, :, length:], was[:, :, length:])


@pytest.mark.parametrize("level", HERE)
@pytest.mark.parametrize("width", [2, 6, 20, 40, 90])
def test_heads_of_any_even_width_are_supported(level, width):
    """Only the attention has this width; the matrices fill complete words."""
    draw = torch.Generator().manual_seed(width)
    matrices, vectors = random_block(draw, 64, 64, 32, 1, width, False)
    block = Block(kernels_of(matrices, level), vectors, width, EPSILON, SCALING)
    x, *angles = (torch.randn(1, n, generator=draw) for n in (64, width, width))
    keys, values = torch.randn(2, 1, 32, 9, width, generator=draw)
    exact = [t[0].double() for t in (x, *angles, keys, values)]
    expected, *_ = reference(
        {n: m.double() for n, m in matrices.items()}, {n: v.double() for n, v in vectors.items()},
        width, exact[0], exact[1:3], *exact[3:],
    )  # fmt: skip
    assert torch.allclose(block.step(x, *angles, keys, values).double(), expected, atol=1e-4)


def test_number_of_threads_does_not_change_the_block():
    draw, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    matrices, vectors = random_block(draw, 1024, 2048, 4, 4, 64, False)
    block = Block(kernels_of(matrices, LEVEL), vectors, 64, EPSILON, SCALING)
    given = [torch.randn(3, n, generator=draw) for n in (1024, 64, 64)]
    cache = torch.randn(2, 3, 4, 300, 64, generator=draw)
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(block.step(*given, *cache.clone()))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_matrices_and_vectors_that_do_not_fit_are_refused():
    draw = torch.Generator().manual_seed(0)
    matrices, vectors = random_block(draw, 64, 64, 2, 2, 32, True)
    kernels = kernels_of(matrices, LEVEL)
    block = Block(kernels, vectors, 32, EPSILON, SCALING)
    for wrong, text in (
        ({"gate": kernels["q"]}, "matrix up of"), ({"k": kernels["o"]}, "matrix k of"),
        ({"o": kernels["k"]}, "matrix o of"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            Block(kernels | wrong, vectors, 32, EPSILON, SCALING)
    with pytest.raises(ValueError, match="q_norm of"):
        Block(kernels, vectors | {"q_norm": torch.ones(31)}, 32, EPSILON, SCALING)
    with pytest.raises(ValueError, match="a block with gate_bias"):
        Block(kernels, vectors | {"gate_bias": torch.ones(64)}, 32, EPSILON, SCALING)
    with pytest.raises(ValueError, match="without output_norm"):
        Block(kernels, {"input_norm": vectors["input_norm"]}, 32, EPSILON, SCALING)
    with pytest.raises(ValueError, match="k_norm in torch.bfloat16 on cpu"):
        Block(kernels, vectors | {"k_norm": torch.ones(32).bfloat16()}, 32, EPSILON, SCALING)
    with pytest.raises(ValueError, match="q_bias in torch.float32 on meta"):
        Block(kernels, vectors | {"q_bias": torch.ones(128, device="meta")}, 32, EPSILON, SCALING)
    with pytest.raises(ValueError, match="a block in torch.float64"):
        Block(kernels, {n: v.double() for n, v in vectors.items()}, 32, EPSILON, SCALING)
    with pytest.raises(ValueError, match="matrices of the kernels for gate"):
        Block(kernels | {"gate": matrices["gate"]}, vectors, 32, EPSILON, SCALING)
    with pytest.raises(ValueError, match="heads of"):
        Block(kernels, {n: vectors[n] for n in ("input_norm", "output_norm")}, 64 // 64, 0, 1)
    x, cosines, sines = torch.randn(3, 64), torch.randn(3, 32), torch.randn(3, 32)
    keys, values = torch.randn(2, 3, 2, 5, 32)
    given = (x, cosines, sines, keys, values)
    for wrong in (
        (x[:, :63], cosines, sines, keys, values), (x.double(), cosines, sines, keys, values),
        (x[0], cosines, sines, keys, values), (x[:2], cosines, sines, keys, values),
        (x[:0], cosines[:0], sines[:0], keys[:0], values[:0]),
        (x, cosines[:2], sines[:2], keys, values), (x, cosines, sines[:1], keys, values),
        (x, cosines[0, 0], sines, keys, values),
        (x, cosines[:, :31], sines, keys, values), (x, cosines, sines, keys, values[:, :, :4]),
        (x, cosines, sines, keys[:, :, :0], values[:, :, :0]),
        (x, cosines, sines, keys[:, :1], values[:, :1]), (x, cosines, sines, keys[:2], values[:2]),
        (x, cosines, sines, keys.bfloat16(), values), (x, cosines, sines, keys[0], values[0]),
        (x, cosines, sines, keys.transpose(2, 3).contiguous().transpose(2, 3), values),
        (torch.randn(3, 128)[:, ::2], cosines, sines, keys, values),
        (x, cosines, sines, keys.to("meta"), values), (x.to("meta"), cosines, sines, keys, values),
        (x, cosines.to("meta"), sines, keys, values), tuple(t.bfloat16() for t in given),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="other shapes"):
            block.step(*wrong)
    for starts in ([0, 0], [0, 5, 0], [0, -1, 0]):
        with pytest.raises(ValueError, match="for 3 sequences of 5 positions"):
            block.step(*given, torch.tensor(starts))


def test_vectors_changed_in_place_are_used_for_the_next_token():
    draw = torch.Generator().manual_seed(0)
    matrices, vectors = random_block(draw, 64, 64, 2, 2, 32, True)
    block = Block(kernels_of(matrices, LEVEL), vectors, 32, EPSILON, SCALING)
    given = [torch.randn(1, n, generator=draw) for n in (64, 32, 32)]
    cache = torch.randn(2, 1, 2, 5, 32, generator=draw)
    before = block.step(*given, *cache.clone())
    for name in vectors:
        vectors[name].data.mul_(2)
        after = block.step(*given, *cache.clone())
        assert not torch.equal(before, after), name
        before = after
    again = Block(kernels_of(matrices, LEVEL), vectors, 32, EPSILON, SCALING)
    assert torch.equal(again.step(*given, *cache.clone()), before)
