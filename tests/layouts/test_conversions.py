"""The pieces of every parameter, in the names and shapes in which transformers stores a family."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from apt.checkpoints.safetensors_io import Shards
from apt.checkpoints.stored import layout_of, read_parameter, write_parameters
from apt.errors import NotStoredError
from apt.layouts import conversions
from apt.layouts.conversions import converted

loading = pytest.importorskip("transformers.core_model_loading", reason="transformers 4 has none")

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    "num_experts_per_tok": 2, "use_mamba_kernels": False,
}  # fmt: skip
KIND = {"num_experts": 3, "moe_intermediate_size": 8}
LOCAL = {"num_local_experts": 3}
ROUTED = {
    "n_routed_experts": 4, "moe_intermediate_size": 8, "n_group": 2, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
TYPES = {
    "qwen2_moe": KIND | {"shared_expert_intermediate_size": 8},
    "qwen3_5_moe_text": KIND | {
        "shared_expert_intermediate_size": 8, "linear_num_key_heads": 2, "linear_key_head_dim": 4,
        "linear_num_value_heads": 4, "linear_value_head_dim": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "olmoe": KIND,
    "jamba": KIND | {
        "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 2,
    },
    "deepseek_v3": ROUTED | {
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
        "v_head_dim": 4,
    },
    "glm4_moe": ROUTED,
    "nemotron_h": ROUTED | {
        "num_hidden_layers": None, "layers_block_type": ["mamba", "moe", "attention"],
        "moe_shared_expert_intermediate_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 8,
        "n_groups": 2, "ssm_state_size": 4, "chunk_size": 4,
    },
    "gpt_oss": LOCAL,
    "llama4_text": LOCAL | {"intermediate_size_mlp": 24, "interleave_moe_layer_step": 2},
    "mixtral": LOCAL,
    "minimax_m2": LOCAL,
    "phimoe": LOCAL,
    "granitemoehybrid": LOCAL | {
        "layer_types": ["mamba", "attention"], "shared_intermediate_size": 8, "mamba_n_heads": 8,
        "mamba_d_head": 4, "mamba_d_state": 4, "mamba_chunk_size": 4,
    },
}  # fmt: skip


def layout(model, shards, blocks="model.layers"):
    """The layout of a model in a checkpoint."""
    found = [(f"{blocks}.{i}", block) for i, block in enumerate(model.get_submodule(blocks))]
    adapter = SimpleNamespace(blocks=lambda module: found)
    source = SimpleNamespace(reference="it")
    return layout_of(
        SimpleNamespace(module=model, whole=None, adapter=adapter, source=source), shards
    )


@pytest.fixture(params=TYPES, scope="module")
def saved(request, tmp_path_factory):
    """A random model of a family, and the directory where transformers saved it."""
    if request.param not in CONFIG_MAPPING:
        pytest.skip("this transformers has no such family")
    sizes = {k: v for k, v in {**SIZES, **TYPES[request.param]}.items() if v is not None}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **sizes))
    model = model.to_empty(device="cpu")
    torch.manual_seed(0)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_pieces_reproduce_the_parameters_of_transformers(saved):
    model, folder = saved
    state, shards = loaded(folder), Shards(folder)
    pieces = layout(model, shards)
    for name, tensor in state.items():
        assert torch.equal(read_parameter(pieces[name], tensor.shape, shards), tensor), name
    before = {key: shards.read(key) for key in shards.entries}
    stacks = [n for n, p in model.named_parameters() if p.ndim == 3 and "conv" not in n]
    new = {name: torch.randn_like(state[name]) for name in (stacks[0], stacks[-1])}
    write_parameters(((pieces[name], tensor) for name, tensor in new.items()), shards)
    again, changed = loaded(folder), {piece.key for name in new for piece in pieces[name]}
    assert all(torch.equal(again[name], (state | new)[name]) for name in state)
    assert {k for k, v in before.items() if not torch.equal(shards.read(k), v)} == changed


def follow(monkeypatch, folder, parameters, tensors, **converter):
    """A model, its shards, and the parameters that transformers makes of stored tensors."""
    model = torch.nn.Module()
    model.base_model_prefix = ""
    model.layers = torch.nn.ModuleList([torch.nn.Module()])
    for name, shape in parameters.items():
        model.layers[0].register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))
    stored = {f"layers.0.{key}": torch.randn(shape) for key, shape in tensors.items()}
    save_file(stored, folder / "model.safetensors")
    entry = loading.WeightConverter(**converter)
    monkeypatch.setattr(conversions, "get_model_conversion_mapping", lambda module: [entry])
    own = loading.WeightConverter(**converter)
    for key in sorted(stored, key=loading.dot_natural_key):
        name, pattern = own.rename_source_key(key)
        own.add_tensor(name, key, pattern, stored[key])
    return model, Shards(folder), own.convert(name, model=model)


OPERATIONS = {
    "cut": (
        {"q": (4, 6), "k": (4, 6)}, {"qk": (8, 6)}, ["qk"], ["q", "k"], [loading.Chunk(0)],
    ),
    "cut along the second": (
        {"q": (4, 6), "k": (4, 6)}, {"qk": (4, 12)}, ["qk"], ["q", "k"], [loading.Chunk(1)],
    ),
    "transposed": (
        {"up": (3, 4, 6)}, {"ups": (3, 6, 4)}, ["ups"], ["up"], [loading.Transpose(1, 2)],
    ),
    "cyclic": (
        {"up": (4, 6, 3)}, {"ups": (3, 4, 6)}, ["ups"], ["up"],
        [loading.Transpose(0, 1), loading.Transpose(1, 2)],
    ),
    "an empty one": (
        {"up": (0, 4, 6)}, {"ups": (0, 6, 4)}, ["ups"], ["up"], [loading.Transpose(1, 2)],
    ),
    "stacked, joined and transposed": (
        {"both": (2, 6, 8)},
        {f"mix.{i}.{n}": (4, 6) for i in range(2) for n in ("b", "a")},
        ["mix.*.b", "mix.*.a"], ["both"],
        [loading.MergeModulelist(0), loading.Concatenate(1), loading.Transpose(1, 2)],
    ),
    "one expert": (
        {"up": (1, 4, 6)}, {"mix.0.b": (4, 6)}, ["mix.*.b"], ["up"], [loading.MergeModulelist(0)],
    ),
    "joined": (
        {"up": (4, 4)}, {"part.10": (4, 1), "part.9": (4, 3)}, ["part.*"], ["up"],
        [loading.Concatenate(1)],
    ),
}  # fmt: skip
if hasattr(loading, "Split"):
    OPERATIONS["parts of the parameters' sizes"] = (
        {"q": (6, 4), "k": (2, 4)}, {"qk": (8, 4)}, ["qk"], ["q", "k"], [loading.Split(0)],
    )  # fmt: skip
if hasattr(loading, "Interleave"):
    OPERATIONS["uninterleaved and cut"] = (
        {"gate": (4, 6), "up": (4, 6)}, {"w13": (8, 6)}, ["w13"], ["gate", "up"],
        [loading.Interleave(0), loading.Chunk(0)],
    )  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_give_the_parameters_of_transformers(name, monkeypatch, tmp_path):
    parameters, tensors, sources, targets, operations = OPERATIONS[name]
    model, shards, expected = follow(
        monkeypatch, tmp_path, parameters, tensors,
        source_patterns=sources, target_patterns=targets, operations=operations,
    )  # fmt: skip
    pieces = layout(model, shards, "layers")
    assert set(pieces) == set(expected) == {f"layers.0.{name}" for name in parameters}
    for target, tensor in expected.items():
        assert torch.equal(read_parameter(pieces[target], tensor.shape, shards), tensor)
    new = {target: torch.randn_like(tensor) for target, tensor in expected.items()}
    write_parameters(((pieces[target], tensor) for target, tensor in new.items()), shards)
    for target, tensor in new.items():
        assert torch.equal(read_parameter(pieces[target], tensor.shape, shards), tensor)


def test_unsupported_operations_are_refused_with_the_parameter(monkeypatch, tmp_path):
    class Reversed(loading.Transpose):
        pass

    model, shards, _ = follow(
        monkeypatch, tmp_path, {"up": (4, 4)}, {"ups": (4, 4)},
        source_patterns=["ups"], target_patterns=["up"], operations=[Reversed(0, 1)],
    )  # fmt: skip
    assert converted(model, shards.shapes)["layers.0.up"].problem
    with pytest.raises(NotStoredError, match=r"layers\.0\.up is .* converts it by Reversed"):
        layout(model, shards, "layers")


def test_stack_without_an_expert_is_refused(saved):
    model, folder = saved
    shards = Shards(folder)
    pieces = layout(model, shards)
    name = next(n for n, p in model.named_parameters() if p.ndim == 3 and "conv" not in n)
    del shards.entries[pieces[name][-1].key]
    with pytest.raises(NotStoredError, match="stored differently|has shape"):
        layout(model, shards)
