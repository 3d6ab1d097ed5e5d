"""Narrower experts, by command and library: choices, streamed runs, counts, invalid options."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import apt as library
from apt import PruneOptions, ShrinkOptions
from apt.adapter import routings
from apt.plugin.registry import registry
from apt.shrinking.proxy import Proxy
from apt.shrinking.skipping import loss_without
from apt.solver import SolverOptions
from tests.helpers import TEXT
from tests.helpers.interrupted import PLACES, KilledError, cut
from tests.helpers.mixtures import mixture
from tests.shrinking.test_experts import TOKENS, ZOO, tensors

pytest.importorskip("transformers.core_model_loading", reason="transformers 4 has lists of experts")

SMALL = ("--samples", 4, "--seqlen", 48, "--calibration", TEXT)
THIRD = ShrinkOptions(sizes={"expert-channels": 0.33})


@torch.no_grad()
def test_each_expert_loses_its_channels_of_least_magnitude():
    model = mixture("qwen3_moe")
    size = ShrinkOptions(sizes={"expert-channels": 8}, compensate=False)
    small, _ = library.shrink(model, TOKENS, size=size, method="group-magnitude")
    chosen = set()
    for layer, other in zip(model.model.layers, small.model.layers, strict=True):
        whole, narrow = layer.mlp.experts, other.mlp.experts
        for expert in range(8):
            down = whole.down_proj[expert]
            kept = down.square().sum(0).topk(8).indices.sort().values
            chosen.add(tuple(kept.tolist()))
            assert torch.equal(narrow.down_proj[expert], down[:, kept])
            gate_up = whole.gate_up_proj[expert]
            assert torch.equal(narrow.gate_up_proj[expert], gate_up[torch.cat([kept, kept + 24])])
    assert len(chosen) > 8


SCORES = ["flap", "llm-pruner", "llm-pruner-vector"]


@pytest.mark.parametrize("method", SCORES)
def test_scores_of_methods_choose_the_small_channels_of_each_expert(method):
    """Eight channels of each expert have random weights, and the others have small weights."""
    model = mixture("gpt_oss", num_hidden_layers=1, intermediate_size=16, moe_intermediate_size=1)
    owner, draw = model.model.layers[0].mlp.experts, torch.Generator().manual_seed(0)
    large = [torch.randperm(16, generator=draw)[:8].sort().values for _ in range(8)]
    with torch.no_grad():
        for expert, kept in enumerate(large):
            others = torch.tensor([c for c in range(16) if c not in kept])
            owner.down_proj[expert, others] *= 1e-3
    size = ShrinkOptions(sizes={"expert-channels": 8}, compensate=False)
    small, _ = library.shrink(model, TOKENS, size=size, method=method, adapter="auto")
    narrow, result = small.model.layers[0].mlp.experts, []
    with torch.no_grad(), routings(owner, result.append):
        model(TOKENS)
    with_tokens = result[0].index.unique()
    assert len(with_tokens) > 2
    for expert in with_tokens:
        kept = large[expert]
        assert torch.equal(narrow.down_proj[expert], owner.down_proj[expert, kept])
        pairs = (2 * kept.unsqueeze(1) + torch.arange(2)).flatten()
        assert torch.equal(narrow.gate_up_proj_bias[expert], owner.gate_up_proj_bias[expert, pairs])


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
@torch.no_grad()
def test_compensation_reduces_the_distance_to_the_dense_model(family):
    model, distances = mixture(family), []
    for exact in (True, False):
        size = ShrinkOptions(sizes=THIRD.sizes, compensate=exact)
        small, _ = library.shrink(model, TOKENS, size=size, adapter="auto")
        distances.append(float((small(TOKENS).logits - model(TOKENS).logits).norm()))
    assert distances[0] < distances[1]


def test_experts_are_removed_and_narrowed_together():
    size = ShrinkOptions(sizes={"experts": 6, "expert-channels": 0.7})
    small, report = library.shrink(mixture("qwen2_moe"), TOKENS, size=size)
    assert {k: v["kept"] for k, v in report.structure["groups"].items()} == {
        "experts": 6, "expert-channels": 16, "heads": 4, "key-value-heads": 2,
    }  # fmt: skip
    assert small.model.layers[0].mlp.experts.down_proj.shape == (6, 16, 16)
    assert small.config.shared_expert_intermediate_size == 24


def streamed(apt, monkeypatch, words):
    """The tensors of a run in memory, and of a streamed run that is killed and resumed."""
    assert apt(*words, "-o", "whole").code == 0
    with monkeypatch.context() as patch:
        cut(patch, PLACES["journal"], 4, KilledError())
        with pytest.raises(KilledError):
            apt(*words, "--stream", "-o", "streamed")
    result = apt(*words, "--resume", "-o", "streamed")
    assert result.code == 0, result.err
    return tensors("whole"), tensors("streamed")


def check_equal(whole, other):
    assert whole.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in whole.items())


def test_killed_streamed_run_resumes_to_the_same_bytes(apt, monkeypatch, capsys):
    """The checkpoint has a separate tensor for every weight of every expert."""
    sizes = ("--size", "expert-channels=0.75", "--size", "experts=12")
    check_equal(*streamed(apt, monkeypatch, ("shrink", "zoo:moe", *sizes, *SMALL)))
    assert apt("verify", "streamed").code == 0
    result = json.loads(apt("inspect", "streamed", "--json").out)
    assert (result["groups"]["experts"], result["groups"]["expert-channels"]) == (12, 48)
    model = AutoModelForCausalLM.from_pretrained("streamed")
    assert not capsys.readouterr().err
    tokenizer = AutoTokenizer.from_pretrained("streamed")
    given = tokenizer("The river", return_tensors="pt")
    assert model.generate(**given, max_new_tokens=4, do_sample=False).shape[1] > 4


def test_streamed_run_narrows_interleaved_stacks(apt):
    model = mixture("gpt_oss", vocab_size=2048, num_attention_heads=2)
    model.save_pretrained("dense")
    AutoTokenizer.from_pretrained(ZOO).save_pretrained("dense")
    words = ("shrink", "dense", "--size", "expert-channels=0.6", *SMALL)
    assert apt(*words, "-o", "whole").code == 0
    assert apt(*words, "--stream", "-o", "streamed").code == 0
    check_equal(tensors("whole"), tensors("streamed"))


def test_keep_narrows_experts_to_a_share_of_the_parameters(apt):
    result = apt("shrink", "zoo:moe", "--width-only", "--keep", "0.75", *SMALL, "-o", "o")
    assert result.code == 0, result.err
    structure = json.loads(Path("o/apt_report.json").read_text())["structure"]
    assert structure["share"] == pytest.approx(0.75, abs=0.01)
    assert structure["groups"]["experts"]["kept"] == 16
    assert structure["groups"]["expert-channels"]["kept"] < 64


@torch.no_grad()
def test_proxy_loss_equals_the_loss_after_a_run():
    model = mixture("qwen3_moe", num_hidden_layers=1)
    spec = registry().adapter_for("qwen3_moe") if "qwen3_moe" in CONFIG_MAPPING else None
    adapter = spec.load()()
    proxy = Proxy(model, adapter, TOKENS, SolverOptions(damping=0.01), ("expert-channels",))
    small, _ = library.shrink(
        model, TOKENS, size=THIRD, options=PruneOptions(random_tokens=0, damping=0.01)
    )
    expected = loss_without(small, adapter, TOKENS, ())
    assert proxy.loss({"expert-channels": 8}, (), TOKENS) == pytest.approx(expected, rel=1e-5)


BAD = {
    "expert-channels can be 8 to 64, in steps of 8, not 20": "expert-channels=20",
    "expert-channels can be 8 to 64, in steps of 8, not 0": "expert-channels=.01",
    "expert-channels can be 8 to 64, in steps of 8, not 72": "expert-channels=72",
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_in_one_line(message, apt):
    result = apt("shrink", "zoo:moe", "--size", BAD[message], *SMALL, "-o", "out")
    assert result.code == 2
    assert message in result.err.splitlines()[-1]
    assert not Path("out").exists()
