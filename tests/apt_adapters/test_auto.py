"""The automatic adapter: it agrees with declared adapters, and conforms on other families."""

import copy
from functools import partial
from importlib.util import find_spec

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import apt as library
from apt.adapter import Site
from apt.cli import app
from apt.errors import AptError
from apt.plugin.registry import registry
from apt.testing import CHECKS, check_adapter
from tests.helpers.families import (
    _HEADS,
    _IDS,
    _SMALL,
    CONFIGS,
    Twice,
    adapter_of,
    random_model,
    random_tokens,
)

STACKED = find_spec("transformers.integrations.moe") is not None  # from transformers 5 on
AUTO = registry().adapters.get("auto").load()
TOKENS = random_tokens(2, 16)
_WIDE = {"intermediate_size": 64, "num_key_value_heads": 2, **_SMALL, **_HEADS, **_IDS}
_OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 2048, **_IDS}
OTHERS = {
    "Qwen3": {"head_dim": 8, **_WIDE},
    "Gemma2": {"head_dim": 8, **_WIDE},  # post-norms: nothing is added as it is
    "Phi": _WIDE,  # attention and MLP side by side, from one input
    "Cohere": _WIDE,
    "Falcon": {k: v for k, v in _WIDE.items() if k != "num_key_value_heads"},
    "StableLm": _WIDE,
    "Starcoder2": _WIDE,
    "GPT2": _OLD,  # weights stored (in, out)
    "GPTJ": {"rotary_dim": 8, **_OLD},
    "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 2048},
    "GPTNeoX": {k: v for k, v in _WIDE.items() if k != "num_key_value_heads"},
}
EXPERTS = {
    "Mixtral": False,
    "Qwen2Moe": False,
    "DeepseekV3": False,
    "GptOss": True,
    "Llama4Text": True,
}
"""Families with stacked experts; True if the slices are stored (in, out)."""
if STACKED:  # by the transformers that is installed
    _MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, **_WIDE}
    OTHERS |= {
        "Mixtral": {"num_local_experts": 4, **_WIDE},
        "Qwen2Moe": {
            "num_experts": 4, "shared_expert_intermediate_size": 16, "mlp_only_layers": [0], **_MOE
        },
        "DeepseekV3": {
            **_MOE, "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
            "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 8, "v_head_dim": 8,
            "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "n_shared_experts": 1,
        },
        "GptOss": {"num_local_experts": 4, "head_dim": 8, **_MOE},
        "Llama4Text": {
            "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 64,
            "head_dim": 8, "interleave_moe_layer_step": 2, **_WIDE, "num_hidden_layers": 4,
        },
    }  # fmt: skip


def of(name, device="cpu"):
    torch.manual_seed(0)
    with torch.device(device):
        config = getattr(transformers, f"{name}Config")(**copy.deepcopy(OTHERS[name]))
        model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 3:  # llama4 leaves its experts as they are
            nn.init.normal_(parameter, std=0.05)
    return model


def essentials(sites: list[Site]):
    """The sites in a comparable form: shared inputs, order and layout."""
    inputs = {}
    for site in sites:
        inputs.setdefault(site.input, []).append(
            (site.parameter, site.order, site.residual, site.transposed, site.calls)
        )
    return sorted(sorted(group) for group in inputs.values())


@pytest.mark.parametrize("variant", CONFIGS)
def test_auto_finds_the_sites_of_the_shipped_adapters(variant):
    model, auto = random_model(variant), AUTO()
    theirs = adapter_of(model)
    assert [n for n, _ in auto.blocks(model)] == [n for n, _ in theirs.blocks(model)]
    for _, block in theirs.blocks(model):
        assert essentials(auto.sites(block)) == essentials(theirs.sites(block))


@pytest.mark.parametrize("name", [n for n in OTHERS if n not in ("Mixtral", "Qwen2Moe")])
def test_auto_conforms_on_families_without_an_adapter(name):
    model = of(name)
    problems = {o.name: o.problem for o in check_adapter(AUTO(), model, TOKENS)}
    assert problems == dict.fromkeys(CHECKS, "")


@pytest.mark.parametrize("name", OTHERS)
def test_auto_finds_the_same_sites_without_weights(name):
    found = []
    for device in ("cpu", "meta"):
        auto, model = AUTO(), of(name, device)
        found.append([essentials(auto.sites(block)) for _, block in auto.blocks(model)])
    assert found[0] == found[1]


def test_auto_prunes_a_model(tmp_path):
    of("GPTJ").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    report = library.prune(model, random_tokens(), pattern="2:4", adapter="auto")
    assert report.sparsity == 0.5
    assert len(report.sites) == 12


@pytest.mark.skipif(not STACKED, reason="experts are modules in this transformers")
def test_experts_in_an_unsupported_product_are_refused():
    """Slices that are copied before they are multiplied cannot be observed."""
    model = of("Mixtral")
    for block in model.model.layers:
        block.mlp.experts.forward = partial(_copied, block.mlp.experts)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AptError, match=r"found no input of model\.layers\.0\.\S*experts"):
        library.prune(model, TOKENS, pattern="2:4", adapter="auto")
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def _copied(experts, states, index, weights):
    """Every expert on every token, by copies of their weights."""
    up = torch.einsum("th,eoh->teo", states, experts.gate_up_proj)
    gate, up = up.chunk(2, -1)
    return torch.einsum("tei,ehi->th", gate * up, experts.down_proj)


@pytest.mark.parametrize("name", [name for name in OTHERS if name in EXPERTS])
def test_experts_are_pruned_and_routers_stay_dense(name):
    model = of(name)
    before = copy.deepcopy(model.state_dict())
    report = library.prune(model, random_tokens(4, 32), pattern="2:4", adapter="auto")
    assert report.sparsity == 0.5
    after = model.state_dict()
    stacks = [n for n in after if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    for stack in stacks:
        weight = after[stack].mT if EXPERTS[name] else after[stack]
        assert ((weight.reshape(*weight.shape[:2], -1, 4) != 0).sum(-1) == 2).all()
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    assert stacks
    assert changed >= set(stacks)
    assert not [
        n for n in changed if "gate.weight" in n or "router" in n or "shared_expert_gate" in n
    ]


def test_empty_tensor_on_the_meta_device_is_accepted():
    model = of("StableLm", "meta")
    model.register_buffer("positions", torch.empty(0, 3, device="meta"))
    assert len(AUTO().blocks(model)) == 3


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_repeated_blocks_are_refused(device):
    model = random_model("llama")
    model.model.layers = Twice(model.model.layers).to(device)
    with pytest.raises(AptError, match="calls its 3 blocks 6 times, not once each"):
        AUTO().enter(model, TOKENS)


def test_second_stack_of_blocks_is_refused():
    model = random_model("llama")
    model.model.late = nn.ModuleList([nn.Sequential(nn.Linear(32, 32))])
    model.model.norm.register_forward_pre_hook(lambda norm, args: model.model.late[0](*args))
    with pytest.raises(AptError, match=r"model\.late\.0 runs beside the blocks"):
        library.prune(model, TOKENS, pattern="2:4", adapter="auto")


def test_second_model_of_the_same_shapes_is_examined():
    auto, residual = AUTO(), []
    for pre_norm in (True, False):
        config = copy.deepcopy(CONFIGS["opt"])
        config.do_layer_norm_before = pre_norm
        model = AutoModelForCausalLM.from_config(config).eval()
        residual.append({s.name for s in auto.sites(auto.blocks(model)[0][1]) if s.residual})
    assert residual == [{"self_attn.out_proj", "fc2"}, {"self_attn.out_proj"}]


def test_positions_reads_the_other_field_names():
    with pytest.raises(AptError, match="has 64 positions"):
        library.prune(of("Mpt"), random_tokens(2, 80), pattern="2:4", adapter="auto")
    text = transformers.LlamaConfig(max_position_embeddings=48)
    assert AUTO().positions(transformers.LlavaConfig(text_config=text)) == 48


def test_model_that_does_not_run_is_refused_in_one_line():
    model = of("GPTJ")
    model.transformer.h[1].mlp = None
    with pytest.raises(AptError, match=r"adapter auto cannot run transformer\.h\.1") as caught:
        library.prune(model, TOKENS, pattern="2:4", adapter="auto")
    assert "adapter of its own" in caught.value.hint


def test_incomplete_capture_is_refused_before_pruning(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "linear", unseen)
    model = of("StableLm")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AptError, match="adapter auto does not fit: .*saw 0 of"):
        library.prune(model, TOKENS, pattern="2:4", adapter="auto")
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_only_other_models_are_checked_again(monkeypatch):
    auto, model = AUTO(), of("StableLm")
    auto.enter(model, TOKENS)
    monkeypatch.setattr(torch.nn.functional, "linear", unseen)  # which a check finds
    auto.enter(copy.deepcopy(model), TOKENS)
    with pytest.raises(AptError, match="adapter auto does not fit: .*saw 0 of"):
        auto.enter(of("Starcoder2"), TOKENS)


def unseen(x, weight, bias=None):
    """A linear function by an operator, which is not a function of torch."""
    product = torch.ops.aten.mm.default(x.flatten(0, -2), weight.t()).view(*x.shape[:-1], -1)
    return product if bias is None else product + bias


def test_prune_reports_the_automatic_adapter(tmp_path):
    of("StableLm").save_pretrained(tmp_path / "model")
    from apt.checkpoints.load import load_tokenizer
    from apt.locations.model_source import find

    load_tokenizer(find("zoo:llama", registry())).save_pretrained(tmp_path / "model")
    run = CliRunner().invoke
    command = ["prune", str(tmp_path / "model"), "--samples", "4"]
    done = run(app, [*command, "--seqlen", "32", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    told = " ".join(done.output.split())
    assert "adapter: auto (default, since none is for type 'stablelm' alone)" in told
    assert "3 × model.layers.0: self_attn.q_proj, self_attn.k_proj, self_attn.v_proj;" in told
    verified = run(app, ["verify", str(tmp_path / "out"), "--pattern", "2:4"])
    assert verified.exit_code == 0, verified.output


@pytest.mark.parametrize("name", ["StableLm", "Phi", "GPT2"])
def test_streamed_model_is_checked_with_artificial_weights(name, monkeypatch):
    model = of(name)
    path = AUTO().blocks(model)[0][0].rpartition(".")[0]
    model.set_submodule(path, model.get_submodule(path).to("meta"))
    proven = AUTO()
    assert proven.enter(model, TOKENS)[0].shape[:2] == TOKENS.shape
    assert all(p.is_meta for _, block in proven.blocks(model) for p in block.parameters())
    monkeypatch.setattr("apt.adapter.weight_tap.WeightTap._report", lambda self, left, right: None)
    with pytest.raises(AptError, match="adapter auto does not fit"):
        AUTO().enter(model, TOKENS)


def test_unused_cross_attention_stays_dense():
    config = transformers.BartConfig(
        d_model=32, decoder_layers=2, decoder_ffn_dim=64, decoder_attention_heads=4,
        is_decoder=True, encoder_layers=0, vocab_size=2048, max_position_embeddings=64,
        **{**_IDS, "pad_token_id": 3},
    )  # fmt: skip
    model = transformers.BartForCausalLM(config).eval()
    before = copy.deepcopy(model.state_dict())
    report = library.prune(model, TOKENS, pattern="2:4", adapter="auto")
    assert len(report.sites) == 12
    for name, value in model.state_dict().items():
        assert "encoder_attn" not in name or torch.equal(value, before[name])


def test_unread_expert_is_refused():
    """No token reaches the experts of a list."""
    model = random_model("llama")
    for layer in model.model.layers:
        layer.mlp.late = nn.ModuleList(nn.Linear(32, 128) for _ in range(8))
    with pytest.raises(
        AptError, match=r"found no input of model\.layers\.0\.mlp\.late\.\d\.weight"
    ):
        AUTO().blocks(model)


def test_blocks_of_the_language_model_are_found_beside_a_larger_encoder():
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**_WIDE),
        vision_config=transformers.CLIPVisionConfig(
            num_attention_heads=4, image_size=28, patch_size=14, **vision
        ),
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    assert [name for name, _ in AUTO().blocks(model)] == [
        f"model.language_model.layers.{index}" for index in range(3)
    ]
