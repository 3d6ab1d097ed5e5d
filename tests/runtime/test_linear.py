"""Packed modules in memory: other tensors, failed moves, hostile descriptions."""

import copy

import pytest
import torch

from apt.layouts.pieces import Piece
from apt.runtime.dense import DenseLinear, use_kernels
from apt.runtime.experts import PackedStack, PlainMatrix
from apt.runtime.linear import FEW, PackedLinear, kernels
from apt.runtime.matrix import SCALES, Entry, encode
from apt.runtime.rounding import encode_rounded


def sparse(seed):
    """A matrix with as many zeros as with any other seed, at other places."""
    draw = torch.Generator().manual_seed(seed)
    matrix = torch.randn(6, 300, generator=draw)
    matrix.view(-1)[torch.randperm(1800, generator=draw)[:1000]] = 0
    return matrix


def encoded(kind, seed):
    return encode(sparse(seed)) if kind == "float32" else encode_rounded(sparse(seed), kind, 128)


def prepared(entry, parts):
    """A module with these tensors."""
    module = PackedLinear(entry, bias=True)
    torch.nn.init.zeros_(module.bias)
    state = {f"weight_{name}": part for name, part in parts.items()}
    module.load_state_dict(state, strict=False)
    module.prepare()
    return module


@pytest.mark.parametrize("native", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
def test_load_state_dict_replaces_the_matrix(native, kind, monkeypatch):
    if native and kernels() is None:
        pytest.skip("apt_kernels is not installed, or was without a compiler")
    if not native:
        monkeypatch.setattr("apt.runtime.linear.kernels", lambda: None)
    one, other = (prepared(*encoded(kind, seed)) for seed in (0, 1))
    x = torch.randn(3, 300)
    assert not torch.allclose(one(x), other(x))
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(x), other(x))
    assert torch.equal(one.weight, other.weight)


def test_tensors_that_do_not_fit_the_description_are_refused():
    module, state = prepared(*encoded("float32", 0)), prepared(*encoded("float32", 1)).state_dict()
    state["weight_mask"][0, 0] ^= 1  # one weight more or less
    with pytest.raises(RuntimeError, match="weight does not fit its description: the mask keeps"):
        module.load_state_dict(state)


def test_failed_move_leaves_the_module_unchanged():
    module, x = prepared(*encoded("int8", 0)), torch.randn(3, 300)
    expected = module(x)

    def full(tensor):
        if tensor.numel():
            raise torch.OutOfMemoryError("the bias does not fit")
        return tensor

    with pytest.raises(torch.OutOfMemoryError):
        module._apply(full)
    assert torch.equal(module(x), expected)
    assert f"weight_{SCALES}" in module.state_dict()


def test_replaced_buffers_give_a_new_matrix():
    module, x = prepared(*encoded("float32", 0)), torch.randn(3, 300)
    expected = module(x)
    for name, tensor in list(module._buffers.items()):
        module._buffers[name] = None if tensor is None else tensor.clone()
    before = module.matrix
    assert torch.equal(module(x), expected)
    assert module.matrix is not before


@pytest.mark.parametrize("change", [{"group": 2**31}, {"shape": [1, 2**31]}, {"group": 2**63}])
def test_impossible_numbers_in_a_description_are_refused(change):
    record = encoded("int8", 0)[0].record()
    with pytest.raises(ValueError, match="with groups of"):
        Entry.read({**record, **change})


@pytest.fixture
def multiplied(half_is_slow, monkeypatch):
    """The dtypes and numbers of weights of all products of torch, where bf16 is slow."""
    found, own = [], torch.nn.functional.linear

    def linear(x, weight, bias=None):
        found.append((x.dtype, weight.dtype, weight.numel()))
        return own(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["packed", "dense", "expert"])
def test_many_vectors_multiply_in_fp32_if_half_precision_is_slow(
    kind, dtype, multiplied, monkeypatch
):
    matrix = sparse(0).to(dtype)
    if kind == "packed":
        entry, parts = encode(matrix)
        multiply = prepared(entry, parts)
        multiply.bias.data = multiply.bias.data.to(dtype)
        monkeypatch.setattr(multiply, "_native", lambda rows: None)  # as on such a processor
    elif kind == "dense":
        model = torch.nn.Sequential(torch.nn.Linear(300, 6, bias=False, dtype=dtype))
        model[0].weight.data = matrix
        use_kernels(model.requires_grad_(False))
        assert type(model[0]) is DenseLinear
        multiply = model[0]
    else:
        stack = PackedStack((1, 6, 300), dtype, [Piece("w", order=())])
        stack.fill({"w": PlainMatrix(matrix[None])})
        multiply = stack[0].linear
    x = torch.randn(2, FEW, 300).to(dtype)
    assert torch.equal(multiply(x), (x.float() @ matrix.float().T).to(dtype))
    assert multiplied == [(torch.float32, torch.float32, 1800)]
    assert multiply(x[:1, :3]).dtype == dtype
    if kind != "packed":  # the kernels multiply few vectors
        assert multiplied[1:] == [(dtype, dtype, 1800)]


def test_matrix_is_expanded_in_tiles_if_half_precision_is_slow(multiplied, monkeypatch):
    monkeypatch.setattr("apt.runtime.linear._TILE", 600)
    matrix = sparse(0).bfloat16()
    packed, x = prepared(*encode(matrix)), torch.randn(20, 300).bfloat16()
    packed.bias.data = packed.bias.data.bfloat16()
    monkeypatch.setattr(packed, "_native", lambda rows: None)
    assert torch.equal(packed(x), (x.float() @ matrix.float().T).bfloat16())
    assert multiplied == [(torch.float32, torch.float32, 600)] * 3


def test_dense_head_uses_a_replaced_weight():
    if kernels() is None:
        pytest.skip("apt_kernels is not installed, or was without a compiler")
    model = torch.nn.Sequential(torch.nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16))
    use_kernels(model.requires_grad_(False))
    head, x = model[0], torch.randn(1, 1024).bfloat16()
    expected = head(x)
    assert torch.equal(copy.deepcopy(head)(x), expected)
    head.weight.data, head.out_features = head.weight.data[:10], 10  # at the same address
    assert torch.equal(head(x), expected[:, :10])
