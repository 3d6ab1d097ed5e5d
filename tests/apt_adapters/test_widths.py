"""The groups that `auto` finds, on families with and without an adapter."""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from apt_adapters.widths import _Model

import apt as library
from apt import PruneOptions, ShrinkOptions
from apt.checkpoints.safetensors_io import Shards
from apt.checkpoints.skeletons import skeleton_module
from apt.plugin.registry import registry
from tests.helpers import ROOT, TEXT
from tests.helpers.families import CONFIGS, adapter_of, random_model, random_tokens
from tests.helpers.releases import needs

AUTO = registry().adapters.get("auto").load()
ALL = {"channels", "heads", "key-value-heads"}
KINDS = {
    "qwen2": ALL,
    "qwen3": ALL,
    "gemma2": ALL,
    "gemma3": ALL,
    "phi3": ALL,  # fused q, k and v; fused gate and up
    "glm4": ALL,
    "cohere2": ALL,
    "olmo2": {"channels"},  # the norms of q and k are over all heads
    "smollm3": ALL,
    "granite": ALL,
    "gpt2": {"channels"},  # the width of all heads is the hidden size, as in the next three
    "gpt_neox": {"channels"},
    "falcon": {"channels"},
    "starcoder2": ALL,
    "gemma4_unified_text": ALL,  # blocks that pass keys and values to later ones
}


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """The folder of the benchmarks, whose files import each other."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def tiny(model_type, **fields):
    return import_module("tiny").model(model_type, num_hidden_layers=2, **fields)


def found(model, auto=None):
    """The groups of each block by kind, in a form that can be compared."""
    adapter = auto or AUTO()
    return [
        {
            groups.kind: (
                groups.count,
                groups.bins,
                groups.readers,
                set(groups.parts),
                {name: [value(n) for n in (1, 2)] for name, value in groups.fields.items()},
            )
            for groups in adapter.groups(block, model.config)
        }
        for _, block in adapter.blocks(model)
    ]


@needs("transformers", "5", "the tiny models are those of transformers 5")
@pytest.mark.parametrize("model_type", KINDS)
def test_narrower_model_equals_the_model_with_unread_groups(model_type):
    rows = list(import_module("widths").rows(model_type, AUTO()))
    assert {row["kind"] for row in rows} == KINDS[model_type]
    for row in rows:
        assert row["difference"] < 1e-5 * row["effect"]
        assert row["kept"] == row["count"] * (0.75 if row["kind"] == "channels" else 0.5)
        assert (row["warnings"], row["generates"]) == ([], True)


@pytest.mark.parametrize("variant", ["llama", "llama-grouped-tied", "mistral", "opt", "bloom"])
def test_auto_finds_the_declared_groups(variant):
    model = random_model(variant)
    assert found(model) == found(model, adapter_of(model))


def test_groups_are_found_without_weights():
    model = random_model("llama-grouped-tied")
    empty = skeleton_module(CONFIGS["llama-grouped-tied"], torch.bfloat16, trust_remote_code=False)
    assert found(empty) == found(model)


@needs("transformers", "5", "the tiny models are those of transformers 5")
def test_site_without_groups_has_a_reason():
    reasons = {}
    for model_type in ("olmo2", "gpt_neox"):
        auto, model = AUTO(), tiny(model_type)
        _, block = auto.blocks(model)[0]
        reasons[model_type] = auto.ungrouped(block, model.config)
    assert reasons == {
        "olmo2": {
            "self_attn.o_proj": "entries of self_attn.q_proj.weight belong to several groups"
        },
        "gpt_neox": {"attention.dense": "no field of GPTNeoXConfig changes its inputs alone"},
    }


def test_groups_with_wrong_entries_are_refused(monkeypatch):
    """The parts begin one entry too late."""
    own = _Model._own

    def shifted(self, run, readers, dims):
        return [
            [(entry + 1) % 64 for entry in entries] for entries in own(self, run, readers, dims)
        ]

    monkeypatch.setattr(_Model, "_own", shifted)
    auto, model = AUTO(), random_model("llama")
    _, block = auto.blocks(model)[0]
    assert auto.groups(block, model.config) == []
    message = "with another intermediate_size the block computes something else"
    assert auto.ungrouped(block, model.config)["mlp.down_proj"] == message


@needs("transformers", "5", "the tiny models are those of transformers 5")
def test_groups_are_found_for_each_kind_of_block():
    """Gated linear attention in three blocks, attention in the last one."""
    model = import_module("tiny").model("qwen3_5_text")
    wish = {"channels": 48, "linear-key-heads": 2, "heads": 2}
    small, report = library.shrink(
        model, random_tokens(2, 8), size=ShrinkOptions(sizes=wish), adapter="auto",
        options=PruneOptions(error_aware=False, random_tokens=0),
    )  # fmt: skip
    config = small.config
    assert (config.intermediate_size, config.num_attention_heads) == (48, 2)
    assert (config.linear_num_key_heads, config.linear_num_value_heads) == (2, 2)
    kept = {kind: entry["kept"] for kind, entry in report.structure["groups"].items()}
    assert kept == wish | {"key-value-heads": 2}


@needs("transformers", "5", "the tiny models are those of transformers 5")
def test_fused_weights_are_shrunk_in_memory_and_streamed(tmp_path, monkeypatch, tokenizer, apt):
    monkeypatch.chdir(tmp_path)
    tiny("phi3", num_key_value_heads=2).save_pretrained("model")
    tokenizer.save_pretrained("model")
    for name, options in (("memory", ()), ("disk", ("--stream",))):
        size = ("--size", "channels=40", "--size", "key-value-heads=1")
        text = ("--samples", 4, "--seqlen", 16, "--calibration", TEXT)
        run = apt("shrink", "model", *size, *text, *options, "-o", name)
        assert run.code == 0, run.err
    memory, disk = (Shards(Path(name)) for name in ("memory", "disk"))
    assert memory.entries.keys() == disk.entries.keys()
    for name in memory.entries:
        torch.testing.assert_close(memory.read(name), disk.read(name), rtol=1e-3, atol=1e-5)
    config = json.loads(Path("disk/config.json").read_text())
    assert (config["intermediate_size"], config["num_attention_heads"]) == (40, 2)


@needs("transformers", "5", "the tiny models are those of transformers 5")
def test_inspect_lists_the_groups(tmp_path, tokenizer, apt):
    tiny("falcon").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    told = " ".join(apt("inspect", tmp_path).out.split())
    assert "groups in a block, for apt-prune shrink: 64 channels" in told
    assert "self_attention.dense, since no field of FalconConfig changes its inputs alone" in told
