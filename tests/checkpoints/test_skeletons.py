"""Skeletons have the buffers and dtypes of loaded models, and streamed runs give equal results."""

import json
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Glm4MoeConfig,
    GPTJConfig,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    RwkvConfig,
)

from apt.adapter import DecoderAdapter
from apt.checkpoints.load import open_skeleton
from apt.checkpoints.offload import assemble
from apt.checkpoints.safetensors_io import Shards
from apt.checkpoints.skeletons import skeleton_module
from apt.checkpoints.stored import open_stored
from apt.errors import AptError
from apt.evaluation.metrics import perplexity
from apt.locations.model_source import find
from apt.plugin.registry import registry
from tests.helpers import TEXT
from tests.helpers.families import CONFIGS, VOCABULARY

IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64}
GEMMA3 = Gemma3TextConfig(
    num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=128, sliding_window=8,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"], **SIZES, **IDS,
)  # fmt: skip
RWKV = RwkvConfig(
    num_hidden_layers=2, attention_hidden_size=32, context_length=64, **SIZES,
    bos_token_id=0, eos_token_id=0,
)  # fmt: skip
_MIXTURE = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
MIXTURES = [
    MixtralConfig(**_MIXTURE, **SIZES, **IDS),
    Llama4TextConfig(
        intermediate_size_mlp=32, interleave_moe_layer_step=1, **_MIXTURE, **SIZES, **IDS
    ),
]
GLM4_MOE = Glm4MoeConfig(
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    first_k_dense_replace=1, n_routed_experts=4, moe_intermediate_size=8, **SIZES, **IDS,
)  # fmt: skip
GPT_OSS = GptOssConfig(**_MIXTURE, **SIZES, **IDS)
if int(transformers.__version__.split(".")[0]) < 5:  # experts are modules there, not stacked
    MIXTURES = []
DATA = ("--samples", 4, "--seqlen", 24)


class RwkvAdapter(DecoderAdapter):
    blocks_path = "rwkv.blocks"


@pytest.fixture
def written(tmp_path, tokenizer):
    """A function that writes a random model of a configuration."""

    def write(config):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model", model

    return write


@pytest.mark.parametrize("config", [*CONFIGS.values(), GEMMA3, RWKV], ids=lambda c: c.model_type)
def test_skeleton_has_meta_parameters_and_the_buffers_of_the_model(config):
    model = skeleton_module(config, trust_remote_code=False)
    assert not model.training
    assert all(parameter.is_meta for parameter in model.parameters())
    complete = AutoModelForCausalLM.from_config(config)
    expected = dict(complete.named_buffers())
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in complete.named_parameters()
    }
    assert dict(model.named_buffers()).keys() == expected.keys()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [GLM4_MOE, GPT_OSS], ids=lambda config: config.model_type)
def test_skeleton_has_the_dtypes_of_a_loaded_model(config, dtype, tmp_path):
    """Routers stay in fp32 beside any other dtype, and the norms of gpt-oss beside fp16."""
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
    model = skeleton_module(config, dtype, trust_remote_code=False)
    assert {n: t.dtype for n, t in model.state_dict().items()} == {
        n: t.dtype for n, t in loaded.items()
    }
    kept = {n for n, t in loaded.items() if t.dtype == torch.float32}
    assert bool(kept) == (config is GLM4_MOE or dtype is torch.float16)


def test_skeleton_has_the_unstored_buffers_of_a_loaded_model(tmp_path):
    """GPT-J's table of positions would have other angles if it were computed in bf16."""
    config = GPTJConfig(
        n_embd=32, n_layer=2, n_head=2, rotary_dim=8, vocab_size=64, n_positions=64, **IDS
    )
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    buffers = dict(skeleton_module(config, torch.bfloat16, trust_remote_code=False).named_buffers())
    expected = dict(loaded.named_buffers())
    assert buffers.keys() == expected.keys()
    assert all(torch.equal(buffers[name], buffer) for name, buffer in expected.items())


def test_modules_of_another_thread_keep_their_weights(monkeypatch):
    modules = []

    class Config:
        pass

    def elsewhere(config, trust_remote_code):
        thread = Thread(target=lambda: modules.append(torch.nn.Linear(2, 2)))
        thread.start()
        thread.join()
        return torch.nn.Linear(2, 2)

    monkeypatch.setattr("apt.checkpoints.skeletons.without_weights", elsewhere)
    assert skeleton_module(Config(), trust_remote_code=False).weight.is_meta
    assert not modules[0].weight.is_meta
    assert not torch.nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize("config", [GEMMA3, *MIXTURES], ids=lambda config: config.model_type)
def test_streamed_run_writes_the_same_bytes_as_one_in_memory(config, written, apt):
    """Gemma 3 has a rotary table for each kind of layer, and a model of one block has only one.

    Mixtral's experts are stored one by one under other names; Llama 4's are stored stacked.
    """
    folder, _ = written(config)
    perplexities = {}
    for name, options in (("memory", ()), ("disk", ("--stream",))):
        command = (folder, "--adapter", "auto", *DATA, *options)
        result = apt("prune", *command, "--calibration", TEXT, "--effort", "fast", "-o", name)
        assert result.code == 0, result.err
        evaluated = apt("eval", *command, "--data", TEXT, "--json")
        assert evaluated.code == 0, evaluated.err
        perplexities[name] = json.loads(evaluated.out)["perplexity"]
    memory, disk = (Shards(Path(name)) for name in ("memory", "disk"))
    assert memory.entries.keys() == disk.entries.keys() == Shards(folder).entries.keys()
    assert all(torch.equal(memory.read(name), disk.read(name)) for name in memory.entries)
    assert perplexities["disk"] == pytest.approx(perplexities["memory"], rel=1e-6)


@torch.no_grad()
def test_assembled_rwkv_computes_the_same_perplexity(written):
    """In RWKV, a block depends on the number of blocks."""
    folder, model = written(RWKV)
    skeleton = open_skeleton(find(str(folder), registry()), registry(), "auto")
    skeleton = replace(skeleton, adapter=RwkvAdapter())
    stored = open_stored(skeleton)
    module = assemble(skeleton, stored.shards, stored.layout, "cpu")
    assert all(parameter.is_meta for parameter in module.rwkv.blocks.parameters())
    outer = {n: p for n, p in module.state_dict().items() if "blocks" not in n}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in outer.items())
    module.rwkv.load_state_dict(model.rwkv.state_dict(), assign=True)
    tokens = torch.arange(1, 25).view(2, 12)
    assert perplexity(module, tokens) == perplexity(model, tokens)


def test_missing_tensor_outside_the_blocks_is_an_error_with_its_name(written):
    folder, model = written(GEMMA3)
    state = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    del state["model.norm.weight"]
    model.save_pretrained(folder, state_dict=state)
    skeleton = open_skeleton(find(str(folder), registry()), registry(), "auto")
    stored = open_stored(skeleton)
    with pytest.raises(AptError, match=r"lacks model\.norm\.weight"):
        assemble(skeleton, stored.shards, stored.layout, "cpu")
