"""The record of what the experts of each block get from each source of the calibration text."""

import json
from pathlib import Path

import pytest
import torch

import apt as apt_package
from apt import ShrinkOptions
from apt.adapter import routings
from apt.calibration.sources import SampleSources
from apt.engine.prune_model import OWN_TEXT, RANDOM_TOKENS
from tests.helpers import TEXT
from tests.helpers.interrupted import PLACES, KilledError, cut
from tests.helpers.mixtures import mixture

pytest.importorskip("transformers.core_model_loading", reason="transformers 4 has lists of experts")

TOKENS = torch.randint(1, 64, (8, 24), generator=torch.Generator().manual_seed(0))
MIX = ("--calibration", f"{TEXT}=3,builtin", "--samples", 4, "--seqlen", 48)
WORDS = ("shrink", "zoo:moe", "--size", "experts=12", "--no-compensate", *MIX)


def record(folder):
    return json.loads(Path(folder, "apt_report.json").read_text())


def routed_by_hand(model, tokens):
    """The tokens and the weights of each expert of the first block, in the dense model."""
    found, experts = [], model.model.layers[0].mlp.experts
    with routings(experts, found.append), torch.no_grad():
        model(tokens)
    index, weights = (torch.cat([getattr(r, n) for r in found]) for n in ("index", "weights"))
    return (
        torch.bincount(index.flatten(), minlength=8).tolist(),
        torch.zeros(8).index_add(0, index.flatten(), weights.flatten()),
    )


@pytest.mark.parametrize("method", ["expert-effect", "expert-joint"])
def test_a_smaller_model_has_the_tokens_of_each_expert_in_its_report(method):
    model = mixture("qwen2_moe")
    _, report = apt_package.shrink(
        model, TOKENS, size=ShrinkOptions(sizes={"experts": 6}), method=method
    )
    entry = report.routing["model.layers.0"]
    tokens, weights = routed_by_hand(model, TOKENS)
    assert list(entry["tokens"]["calibration"]) == tokens
    assert list(entry["weights"]["calibration"]) == pytest.approx(weights.tolist(), rel=1e-4)


@pytest.mark.parametrize("ordered", [False, True])
def test_a_sparse_model_has_them_too(ordered):
    model = mixture("qwen2_moe")
    tokens, _ = routed_by_hand(model, TOKENS)
    options = apt_package.PruneOptions(error_aware=False, ordered=ordered, random_tokens=0)
    _, report = apt_package.prune_copy(
        model, TOKENS, pattern="2:4", method="wanda", options=options,
        selection=apt_package.Selection(only=("*.experts.*",)),
    )  # fmt: skip
    assert list(report.routing["model.layers.0"]["tokens"]["calibration"]) == tokens
    assert sum(tokens) == 2 * TOKENS.numel()


def test_each_source_of_a_mix_is_counted_by_itself(apt):
    result = apt(*WORDS, "-o", "small")
    assert result.code == 0, result.err
    report = record("small")
    sources = report["calibration"]["sources"]
    assert [(s["name"], s["samples"], s["chat"]) for s in sources] == [
        (TEXT.name, 3, False), ("builtin", 1, False)
    ]  # fmt: skip
    assert report["calibration"]["source"] == f"{TEXT.name}=0.75,builtin=0.25"
    assert report["options"]["calibration"] == report["calibration"]["source"]
    for block in report["routing"].values():
        counts = {name: sum(tokens) for name, tokens in block["tokens"].items()}
        assert sorted(counts.values()) == [2 * 48, 2 * 3 * 48]


def test_a_streamed_run_that_is_resumed_has_the_same_record(apt, monkeypatch):
    assert apt(*WORDS, "-o", "whole").code == 0
    with monkeypatch.context() as patch:
        cut(patch, PLACES["journal"], 4, KilledError())
        with pytest.raises(KilledError):
            apt(*WORDS, "--stream", "-o", "streamed")
    assert apt(*WORDS, "--stream", "--resume", "-o", "streamed").code == 0
    assert record("whole")["routing"] == record("streamed")["routing"]


def test_the_page_has_a_table_with_a_row_for_each_source(apt):
    assert apt(*WORDS, "-o", "small").code == 0
    assert apt("report", "small", "-o", "page.html").code == 0
    page = Path("page.html").read_text()
    assert "Router weight of each source by expert" in page
    for block, entry in record("small")["routing"].items():
        for source, weights in entry["weights"].items():
            row = page.partition(f">{block}, {source}</th>")[2].partition("</tr>")[0]
            assert row.count("<td") == 16
            assert f">{weights[0] / sum(weights):.1%}<" in row


def test_generated_samples_are_sources_of_their_own(apt):
    result = apt(*WORDS, "--own-samples", 2, "--random-tokens", 0.5, "-o", "small")
    assert result.code == 0, result.err
    block = next(iter(record("small")["routing"].values()))
    counts = {name: sum(tokens) // 96 for name, tokens in block["tokens"].items()}
    assert sum(counts.values()) == 4 + 2 + 3
    assert {OWN_TEXT: 2, RANDOM_TOKENS: 3}.items() <= counts.items()
    assert record("small")["calibration"]["shape"] == [6, 48]


def test_sources_of_a_part_of_the_samples():
    sources = SampleSources(("a", "b"), torch.tensor([0, 1, 0, 1]), 2)
    part = sources.part(torch.tensor([True, True, False, False]))
    assert part.of.tolist() == [0, 1]
    assert (part.names, part.mixed) == (("a", "b"), 2)
