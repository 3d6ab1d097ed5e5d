"""Packed experts: the model gives the results of the dense one with fewer bytes in memory."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import apt.runtime as runtime
from apt.checkpoints.safetensors_io import Shards
from apt.layouts.pieces import Piece
from apt.packing.directory import Rounding, pack, unpack
from apt.runtime.entries import read_entries
from apt.runtime.experts import PackedStack, PlainMatrix, are_matrices
from apt.runtime.linear import PackedLinear
from apt.runtime.matrix import encode

pytest.importorskip("transformers.core_model_loading", reason="transformers 4 stacks no experts")

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 32,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "num_experts_per_tok": 2,
}  # fmt: skip
LOCAL = {"num_hidden_layers": 2, "num_local_experts": 3, **SIZES}
CONFIGS = {
    "one by one, renamed": {"model_type": "mixtral", **LOCAL},
    "a stack (in, out)": {"model_type": "gpt_oss", **LOCAL},
    "multiplied at once": {
        "model_type": "llama4_text", "intermediate_size_mlp": 96, "interleave_moe_layer_step": 1,
        **LOCAL,
    },
    "another prefix": {
        "model_type": "nemotron_h", "layers_block_type": ["attention", "moe"],
        "n_routed_experts": 4, "moe_intermediate_size": 96, "n_group": 1, "topk_group": 1,
        "moe_shared_expert_intermediate_size": 96, **SIZES,
    },
}  # fmt: skip
TOKENS = torch.arange(1, 25).view(2, 12)


@pytest.fixture(params=CONFIGS)
def pruned(request, tmp_path):
    """A model with zeros in all matrices of its blocks, its directory, and their tensors."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**CONFIGS[request.param]), dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "dense")
    shards = Shards(tmp_path / "dense")
    names = [n for n, e in shards.entries.items() if "layers" in n and min(e.shape[-2:]) > 4]
    values = {name: torch.randn(shards.entries[name].shape) * 0.1 for name in names}
    shards.write((name, value * (value > 0)) for name, value in values.items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", experts_implementation="eager")
    return model.eval(), tmp_path / "dense", names


def in_memory(model):
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@torch.no_grad()
def test_packed_experts_give_the_same_logits_with_fewer_bytes(pruned, tmp_path):
    dense, folder, names = pruned
    (tmp_path / "packed").mkdir()
    pack(folder, {name: None for name in names if "experts" in name}, tmp_path / "packed")
    model = runtime.load(tmp_path / "packed")
    stacks = [m for m in model.modules() if isinstance(m, PackedStack)]
    assert len(stacks) >= 2
    logits, expected = (m(TOKENS).logits for m in (model, dense))
    assert (logits - expected).norm() < 0.01 * expected.norm()
    generated = [m.generate(TOKENS, max_new_tokens=3, do_sample=False) for m in (model, dense)]
    assert torch.equal(*generated)
    held = sum(in_memory(stack) for stack in stacks)
    assert held < 0.6 * sum(2 * stack.shape.numel() for stack in stacks)
    assert in_memory(model) < 0.75 * in_memory(dense)
    wide = runtime.load(tmp_path / "packed", dtype=torch.float32)(TOKENS).logits
    assert wide.dtype == torch.float32
    assert torch.allclose(wide, dense(TOKENS).logits.float(), atol=0.05)
    (tmp_path / "unpacked").mkdir()
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    before, after = Shards(folder), Shards(tmp_path / "unpacked")
    assert before.entries.keys() == after.entries.keys()
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.entries)


@torch.no_grad()
@pytest.mark.parametrize("pruned", ["one by one, renamed", "a stack (in, out)"], indirect=True)
def test_experts_without_zeros_stay_dense(pruned, tmp_path):
    """A matrix without zeros would need more bytes."""
    _, folder, names = pruned
    experts = [name for name in names if "experts" in name]
    shards = Shards(folder)
    shards.write([(experts[0], torch.randn(shards.entries[experts[0]].shape))])
    dense = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    (tmp_path / "packed").mkdir()
    pack(folder, dict.fromkeys(experts), tmp_path / "packed")
    assert set(read_entries(tmp_path / "packed")) == set(experts[1:])
    model = runtime.load(tmp_path / "packed")
    logits, expected = (m(TOKENS).logits for m in (model, dense))
    assert (logits - expected).norm() < 0.01 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("pruned", ["one by one, renamed", "a stack (in, out)"], indirect=True)
def test_experts_are_packed_as_integers(pruned, tmp_path):
    dense, folder, names = pruned
    experts = [name for name in names if "experts" in name]
    (tmp_path / "packed").mkdir()
    done = pack(folder, dict.fromkeys(experts, Rounding("int8", "row")), tmp_path / "packed")
    assert done.packed_bytes < 0.4 * done.dense_bytes
    model = runtime.load(tmp_path / "packed")
    logits, expected = model(TOKENS).logits.float(), dense(TOKENS).logits.float()
    assert 0 < (logits - expected).norm() < 0.05 * expected.norm()


def packed(weight):
    """A packed module of a matrix, or of the rows of a stack."""
    entry, parts = encode(weight.flatten(0, -2))
    module = PackedLinear(entry, bias=False)
    module.load_state_dict({f"weight_{name}": part for name, part in parts.items()})
    module.prepare()
    return module


def stacked():
    """A parameter and the stack of it, of three packed matrices and one that is dense."""
    draw = torch.Generator().manual_seed(0)
    whole = torch.randn(2, 6, 20, generator=draw).relu()
    first, last = slice(0, 4), slice(4, 6)
    parts = [(expert, rows, slice(0, 20)) for expert in (0, 1) for rows in (first, last)]
    stack = PackedStack(
        whole.shape, whole.dtype, [Piece(str(n), part) for n, part in enumerate(parts)]
    )
    stack.fill({
        str(n): packed(whole[part]) if n else PlainMatrix(whole[part])
        for n, part in enumerate(parts)
    })  # fmt: skip
    return whole, stack


def test_packed_stack_behaves_like_a_tensor():
    whole, stack = stacked()
    assert (stack.shape, stack.dtype, stack.ndim) == (whole.shape, whole.dtype, whole.ndim)
    assert len(stack) == 2
    assert stack.device == whole.device
    for index in (0, -1, torch.tensor(1), slice(1, 2), (1, slice(2, 4)), [1, 0]):
        assert torch.equal(torch.clone(stack[index]), whole[index])
    x = torch.randn(2, 5, 20)
    assert torch.equal(torch.bmm(x, stack.transpose(1, 2)), torch.bmm(x, whole.transpose(1, 2)))
    assert torch.equal(torch.einsum("eti,eoi->eto", x, stack), torch.einsum(
        "eti,eoi->eto", x, whole
    ))  # fmt: skip
    for expert in (0, 1):  # with a dense matrix, and with packed ones alone
        assert torch.equal(x[0] @ stack[expert].T, x[0] @ whole[expert].T)
        assert torch.equal(x[0] @ stack[expert].transpose(0, 1), x[0] @ whole[expert].T)
        assert stack[expert].shape == whole[expert].shape
        assert torch.equal(stack[expert][:2], whole[expert][:2])
        assert torch.equal(torch.stack([stack[expert], x[0, :1].expand(6, 20)])[0], whole[expert])
        product = F.linear(x[0], stack[expert], bias=torch.ones(6))
        assert torch.allclose(product, F.linear(x[0], whole[expert]) + 1, atol=1e-5)
    half = copy.deepcopy(stack).bfloat16()
    assert half[0].dense().dtype == half.dtype == torch.bfloat16
    assert torch.equal(half.dense(), whole.bfloat16())
    with pytest.raises(AttributeError):
        stack.no_such_method()
    with pytest.raises(IndexError):
        stack[2]


def test_transposed_stack_is_transposed_back():
    stored = torch.randn(2, 6, 20).relu()
    piece = Piece("it", order=(0, 2, 1))
    assert are_matrices([piece])
    stack = PackedStack((2, 20, 6), stored.dtype, [piece])
    stack.fill({"it": packed(stored)})
    assert torch.equal(stack.dense(), stored.transpose(1, 2))
    turned = [
        Piece(name, (n, slice(0, 20), slice(0, 6)), order=(1, 0)) for n, name in enumerate("ab")
    ]
    assert are_matrices(turned)
    stack = PackedStack((2, 20, 6), stored.dtype, turned)
    stack.fill({"a": packed(stored[0]), "b": PlainMatrix(stored[1])})
    assert torch.equal(stack.dense(), stored.transpose(1, 2))
    assert not are_matrices([Piece("it", of=(slice(0, 1), slice(0, 6)))])
    assert not are_matrices([Piece("it", order=(1, 0, 2))])
