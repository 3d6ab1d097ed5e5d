"""Fewer experts: exact counts, plain transformers, streamed runs, invalid options."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import apt as apt_package
from apt import AptError, ShrinkOptions
from tests.helpers import TEXT
from tests.helpers.interrupted import PLACES, KilledError, cut
from tests.helpers.mixtures import mixture

pytest.importorskip("transformers.core_model_loading", reason="transformers 4 has lists of experts")

ZOO = Path(apt_package.__file__).parents[1] / "adapters/apt_adapters/zoo/moe"
SMALL = ("--samples", 4, "--seqlen", 48, "--calibration", TEXT)
METHODS = ["expert-joint", "reap", "expert-effect", "expert-frequency", "expert-merge"]
TOKENS = torch.randint(1, 64, (8, 24), generator=torch.Generator().manual_seed(0))


def tensors(folder):
    return {k: v for f in Path(folder).glob("*.safetensors") for k, v in load_file(f).items()}


@pytest.mark.parametrize("method", METHODS)
def test_methods_of_experts_change_only_experts_and_routers(method, tmp_path):
    model, size = mixture("qwen2_moe"), ShrinkOptions(sizes={"experts": 5})
    small, report = apt_package.shrink(model, TOKENS, size=size, method=method)
    assert report.structure["groups"]["experts"] == {"kept": 5, "of": 8}
    small.save_pretrained(tmp_path)
    loaded, before = AutoModelForCausalLM.from_pretrained(tmp_path), model.state_dict()
    assert torch.equal(loaded(TOKENS).logits, small(TOKENS).logits)
    assert loaded.config.num_experts == 5
    for name, tensor in loaded.state_dict().items():
        if "mlp.experts" in name or name.endswith("mlp.gate.weight"):
            assert len(tensor) == 5
        else:
            assert torch.equal(tensor, before[name]), name
        if name.endswith("mlp.gate.weight"):
            rows = [row.tolist() for row in before[name]]
            assert all(row.tolist() in rows for row in tensor)


def test_killed_streamed_run_resumes_to_the_same_bytes(apt, monkeypatch):
    words = ("shrink", "zoo:moe", "--size", "experts=6", "--method", "expert-merge", *SMALL)
    assert apt(*words, "-o", "whole").code == 0
    with monkeypatch.context() as patch:
        cut(patch, PLACES["journal"], 4, KilledError())
        with pytest.raises(KilledError):
            apt(*words, "--stream", "-o", "streamed")
    result = apt(*words, "--resume", "-o", "streamed")
    assert result.code == 0, result.err
    whole, streamed = tensors("whole"), tensors("streamed")
    assert whole.keys() == streamed.keys()
    assert all(torch.equal(tensor, streamed[name]) for name, tensor in whole.items())
    check_record(apt)


def check_record(apt):
    """Check that the reports and the page have the removed and merged experts of each block."""
    result, other = (
        json.loads(Path(f"{name}/apt_report.json").read_text())["structure"]["experts"]
        for name in ("whole", "streamed")
    )
    assert result == other
    assert apt("report", "streamed", "-o", "page.html").code == 0
    page, small = Path("page.html").read_text(), tensors("streamed")
    for block, entry in result.items():
        dense = tensors(ZOO)[f"{block}.mlp.gate.weight"]
        left = [e for e in range(16) if e not in entry["removed"]]
        assert torch.equal(small[f"{block}.mlp.gate.weight"], dense[left])
        assert {expert for expert, _ in entry["merged"]} <= set(entry["removed"])
        assert {other for _, other in entry["merged"]} <= set(left)
        assert f">{', '.join(map(str, entry['removed']))}<" in page
        assert ", ".join(f"{expert} into {other}" for expert, other in entry["merged"]) in page


def distance(model, **options):
    size = ShrinkOptions(sizes={"experts": 4}, compensate=options.pop("compensate", None))
    small, _ = apt_package.shrink(model, TOKENS, adapter="auto", size=size, **options)
    with torch.no_grad():
        return float((small(TOKENS).logits - model(TOKENS).logits).norm())


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_compensation_reduces_the_distance_to_the_dense_model(family):
    model = mixture(family)
    assert distance(model) < 0.95 * distance(model, compensate=False)


def test_each_group_of_a_router_loses_the_same_number():
    size = ShrinkOptions(sizes={"experts": 6})
    small, _ = apt_package.shrink(mixture("deepseek_v3"), TOKENS, adapter="auto", size=size)
    assert small.config.n_routed_experts == 6
    assert small(TOKENS).logits.isfinite().all()
    odd = ShrinkOptions(sizes={"experts": 5})
    with pytest.raises(AptError, match="experts can be 4 to 8, in steps of 2, not 5"):
        apt_package.shrink(mixture("deepseek_v3"), TOKENS, adapter="auto", size=odd)


def test_experts_with_an_unreadable_router_are_chosen_by_effect():
    model = mixture("llama4_text")
    assert distance(model) > 0
    with pytest.raises(AptError, match="Llama4TextExperts does not get the indices .* leave the m"):
        distance(model, method="reap")


def the_first(experts, groups):
    return groups.mask(tuple(range(groups.removed)))


def test_function_of_two_arguments_chooses_experts():
    model = mixture("qwen2_moe")
    size = ShrinkOptions(sizes={"experts": 6}, compensate=False)
    small, _ = apt_package.shrink(model, TOKENS, size=size, method=the_first)
    for small_layer, layer in zip(small.model.layers, model.model.layers, strict=True):
        left, right = small_layer.mlp.experts, layer.mlp.experts
        assert torch.equal(left.gate_up_proj, right.gate_up_proj[2:])
        assert torch.equal(left.down_proj, right.down_proj[2:])


WRONG = {
    "method none_of_them removes 0 groups instead of 2": lambda experts, groups: groups.mask(()),
    "method none_of_them returns NoneType as a mask": lambda experts, groups: None,
}


@pytest.mark.parametrize("message", WRONG)
def test_invalid_choice_of_experts_is_refused(message):
    choose, size = WRONG[message], ShrinkOptions(sizes={"experts": 6})
    choose.__name__ = "none_of_them"
    with pytest.raises(AptError, match=message):
        apt_package.shrink(mixture("qwen2_moe"), TOKENS, size=size, method=choose)


def test_share_of_the_experts_is_rounded_to_full_bins():
    size = ShrinkOptions(sizes={"experts": 0.7}, compensate=False)
    small, _ = apt_package.shrink(mixture("deepseek_v3"), TOKENS, adapter="auto", size=size)
    assert small.config.n_routed_experts == 6


def test_method_of_experts_keeps_the_share_of_the_parameters(apt):
    result = apt("shrink", "zoo:moe", "--method", "reap", "--keep", "0.65", *SMALL, "-o", "o")
    assert result.code == 0, result.err
    report = json.loads(Path("o/apt_report.json").read_text())
    assert report["structure"]["groups"]["experts"]["kept"] == 8
    assert report["structure"]["share"] == pytest.approx(0.65, abs=0.01)
    assert "mean relative layer error" not in result.out + result.err  # no matrix lost columns


def test_inspect_gives_the_number_of_active_parameters(apt):
    result = apt("inspect", "zoo:moe", "--json")
    found = json.loads(result.out)
    model = AutoModelForCausalLM.from_pretrained(ZOO)
    inside = sum(p.numel() for n, p in model.named_parameters() if "mlp.experts" in n)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["active_parameters"] == found["parameters"] - inside * 14 // 16


BAD = {
    "experts can be 2 to 16, not 1": ("zoo:moe", "--size", "experts=1"),
    "experts can be 2 to 16, not 17": ("zoo:moe", "--size", "experts=17"),
    "experts can be 2 to 16, not 0": ("zoo:moe", "--size", "experts=.01"),
    "size experts=1.5 is not KIND=N; write": ("zoo:moe", "--size", "experts=1.5"),
    "the model has no experts to remove; it has: channels": ("zoo:llama", "--size", "experts=4"),
    "the model has no experts to remove; it has": (
        "zoo:llama",
        "--method",
        "reap",
        "--size",
        "experts=4",
    ),
    "method reap chooses experts, and none are removed": ("zoo:llama", "--method", "reap"),
    "method reap chooses experts, and none are": ("zoo:moe", "--method", "reap", "--depth-only"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_in_one_line(message, apt):
    result = apt("shrink", *BAD[message], *SMALL, "-o", "out")
    assert result.code == 2
    assert message in result.err.splitlines()[-1]
    assert not Path("out").exists()
