"""Experts that are kept for one source, and experts that few tokens reach."""

import json
from pathlib import Path

import pytest
import torch

import apt as apt_package
from apt import AptError, ShrinkOptions
from apt.calibration.batches import OpenBlock, enter
from apt.plugin.registry import registry
from apt.pruning.expert_choice import lowest, needed, protected_experts, with_protected
from apt.pruning.routed_experts import RoutedExperts
from apt.solver import ColumnGroups
from tests.helpers import TEXT
from tests.helpers.mixtures import mixture

pytest.importorskip("transformers.core_model_loading", reason="transformers 4 has lists of experts")

MIX = ("--calibration", f"builtin:wiki=3,{TEXT}", "--samples", 4, "--seqlen", 48)
METHODS = ["expert-joint", "reap", "expert-effect", "expert-frequency", "expert-merge"]
TOKENS = torch.randint(1, 64, (8, 24), generator=torch.Generator().manual_seed(0))


def experts_of(family, tokens=TOKENS, least=0, size=48, **changed):
    """The experts of the last block of a mixture, and the block."""
    model = mixture(family, **changed)
    spec = registry().adapter_for(model.config.model_type)
    adapter = spec.make()
    with adapter.running(model):
        _, module = adapter.blocks(model)[-1]
        batches = enter(adapter, model, tokens, size)
        block = OpenBlock(adapter, module, len(adapter.blocks(model)) - 1, batches)
        groups = next(g for g in adapter.groups(module, model.config) if g.routed)
        return RoutedExperts(block, groups, least)


def test_the_fewest_experts_with_half_of_the_weight_are_needed():
    weights = torch.tensor([1.0, 5.0, 2.0, 4.0, 0.0])
    assert needed(weights).nonzero().squeeze(1).tolist() == [1, 3]
    assert needed(weights, 0.3).nonzero().squeeze(1).tolist() == [1]
    assert not needed(torch.zeros(3)).any()


def test_experts_without_a_place_are_those_of_the_smallest_shares():
    chat, code = torch.tensor([6.0, 4.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 30.0, 1.0])
    kept, left = protected_experts([chat, code], ColumnGroups(4, 3))
    assert kept.tolist() == [True, False, True, False]
    assert left == ()
    kept, left = protected_experts([chat, code], ColumnGroups(4, 1))
    assert kept.tolist() == [False, False, True, False]
    assert left == (0,)
    kept, left = protected_experts([chat, code], ColumnGroups(4, 2, bins=2))
    assert kept.tolist() == [True, False, True, False]


def test_protected_experts_are_not_the_lowest():
    scores, groups = torch.tensor([1.0, 2.0, 3.0, 4.0]), ColumnGroups(4, 2)
    assert lowest(scores, groups).tolist() == [True, True, False, False]
    protected = torch.tensor([True, False, False, False])
    assert lowest(scores, groups, protected).tolist() == [False, True, True, False]


def test_a_choice_that_knows_no_protection_removes_others_of_least_weight():
    experts = experts_of("qwen2_moe")
    experts.protected = torch.zeros(8, dtype=torch.bool)
    experts.protected[[0, 1]] = True
    groups, weight = ColumnGroups(8, 5), experts.by_source.weights.sum(0)
    removed = with_protected(groups.mask((0, 1, 2)), experts, groups)
    others = sorted(range(3, 8), key=lambda expert: float(weight[expert]))[:2]
    assert removed.nonzero().squeeze(1).tolist() == sorted([2, *others])


@pytest.mark.parametrize("method", METHODS)
def test_every_choice_keeps_the_experts_that_a_source_needs(apt, method):
    words = ("shrink", "zoo:moe", "--size", "experts=4", "--no-compensate", "--method", method)
    assert apt(*words, *MIX, "--protect", TEXT, "-o", "kept").code == 0
    report = json.loads(Path("kept/apt_report.json").read_text())
    assert report["options"]["protect"] == [TEXT.name]
    for block, entry in report["structure"]["experts"].items():
        weights = torch.tensor(report["routing"][block]["weights"][TEXT.name])
        wanted = set(needed(weights).nonzero().squeeze(1).tolist())
        left = set(range(16)) - set(entry["removed"])
        assert len(left) == 4
        assert wanted - left == set(entry.get("unprotected", ()))
        assert len(left & wanted) == min(4, len(wanted))


def test_too_few_places_are_told(apt):
    words = ("shrink", "zoo:moe", "--size", "experts=2", "--no-compensate", *MIX)
    result = apt(*words, "--protect", "builtin:wiki", "-o", "kept")
    assert result.code == 0, result.err
    assert "protect: 3 blocks keep fewer experts than builtin:wiki needs" in result.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "experts=8", "--protect", "code"), "code is not a source of the calibration"),
        (
            ("--size", "expert-channels=0.75", "--protect", TEXT),
            "protect has no effect: no experts",
        ),
        (("--size", "expert-channels=0.75", "--expert-tokens", 4), "expert tokens has no effect"),
    ],
)
def test_options_without_experts_or_a_source_are_refused(apt, words, message):
    result = apt("shrink", "zoo:moe", *words, *MIX, "-o", "out")
    assert result.code == 2
    assert message in result.err
    assert not Path("out").exists()


def test_experts_that_cannot_be_read_cannot_be_protected():
    size = ShrinkOptions(sizes={"experts": 4}, expert_tokens=2)
    with pytest.raises(AptError, match="Llama4TextExperts does not get .* leave the option out"):
        apt_package.shrink(mixture("llama4_text"), TOKENS, adapter="auto", size=size)


def test_further_batches_are_read_until_each_expert_has_its_tokens(monkeypatch):
    monkeypatch.setattr("apt.pruning.routed_experts._TOKENS", 48)
    tokens = torch.randint(1, 64, (48, 24), generator=torch.Generator().manual_seed(0))
    few = experts_of("qwen3_moe", tokens)
    least = int(few.by_source.tokens.sum(0).min()) + 1
    more = experts_of("qwen3_moe", tokens, least=least)
    assert len(few.sizes) == 48
    assert 48 < len(more.sizes) < tokens.numel()
    assert int(more.by_source.tokens.sum(0).min()) >= least
    assert more.underserved == ()
    assert more.judged is more.routing or torch.equal(more.judged.index, more.routing.index)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_an_expert_with_few_tokens_is_judged_on_those_that_are_nearest(family):
    experts = experts_of(family, least=120)
    counts = experts.sums(torch.ones_like(experts.routing.weights))
    assert experts.underserved == tuple((counts < 120).nonzero().squeeze(1).tolist())
    assert experts.underserved
    judged = experts.sums(torch.ones_like(experts.judged.weights))
    for expert in range(8):
        if expert not in experts.underserved:
            assert judged[expert] == counts[expert]
        else:
            assert judged[expert] == 120
            added = experts.judged.weights[experts.judged.index == expert]
            assert bool((added > 0).all())


def test_the_weight_of_an_expert_that_is_not_picked_is_that_of_the_router():
    """Qwen3-MoE divides the probabilities of the picks by their sum; the scale is the same here."""
    experts = experts_of("qwen3_moe")
    model = mixture("qwen3_moe")
    gate = model.model.layers[-1].mlp.gate.weight
    chances = torch.softmax(experts.routing.inputs @ gate.T, 1)
    sums = chances.gather(1, experts.routing.index).sum(1)
    for expert in range(8):
        weight, other = experts._weight_of(expert), (experts.routing.index != expert).all(1)
        assert torch.allclose(weight[other], (chances[:, expert] / sums)[other], rtol=1e-3)
        assert not weight[~other].any()


def test_underserved_experts_are_counted_in_the_report_and_told(apt):
    words = ("shrink", "zoo:moe", "--size", "experts=12", "--no-compensate", *MIX)
    result = apt(*words, "--expert-tokens", 20, "-o", "small")
    assert result.code == 0, result.err
    report = json.loads(Path("small/apt_report.json").read_text())
    entries, count = report["structure"]["experts"], 0
    for block, entry in entries.items():
        tokens = torch.tensor(list(report["routing"][block]["tokens"].values())).sum(0)
        few = (tokens < 20).nonzero().squeeze(1).tolist()
        assert entry.get("underserved", []) == few
        count += len(few)
    assert count
    assert f"expert tokens: {count} of 48 experts got fewer than 20" in result.err
    assert report["options"]["shrink"]["expert_tokens"] == 20


def test_without_a_least_number_the_choice_is_as_before():
    experts = experts_of("qwen2_moe")
    assert experts.judged is experts.routing
    assert experts.underserved == ()
