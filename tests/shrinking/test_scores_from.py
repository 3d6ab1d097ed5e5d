"""A second result from the scores of experts that a first run kept: no second calibration."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apt.pruning import pipeline
from tests.helpers import TEXT
from tests.helpers.interrupted import PLACES, KilledError, cut

pytest.importorskip("transformers.core_model_loading", reason="transformers 4 has lists of experts")

SMALL = ("--samples", 4, "--seqlen", 48, "--calibration", f"{TEXT},builtin:wiki")
PLAIN = ("shrink", "zoo:moe", "--no-compensate", *SMALL)


def tensors(folder):
    return {k: v for f in Path(folder).glob("*.safetensors") for k, v in load_file(f).items()}


def report(folder):
    return json.loads(Path(folder, "apt_report.json").read_text())


def same(left, right):
    one, other = tensors(left), tensors(right)
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def first(apt, *words):
    assert apt(*PLAIN, "--size", "experts=8", *words, "-o", "first").code == 0


@pytest.mark.parametrize("method", ["reap", "expert-effect", "expert-frequency"])
def test_a_second_size_is_that_of_a_whole_run(apt, method, monkeypatch):
    first(apt, "--dense-scores", "--method", method)
    whole = (*PLAIN, "--size", "experts=4", "--dense-scores", "--method", method)
    assert apt(*whole, "-o", "whole").code == 0
    monkeypatch.setattr(pipeline, "_entered_batches", None)  # so that no block can be run
    result = apt("shrink", "zoo:moe", "--from", "first", "--size", "experts=4", "-o", "second")
    assert result.code == 0, result.err
    assert same("whole", "second")
    record, expected = report("second"), report("whole")
    assert record["structure"]["experts"] == expected["structure"]["experts"]
    assert record["calibration"] == expected["calibration"]
    assert record["routing"] == expected["routing"]


def test_scores_do_not_depend_on_the_number_of_experts_that_is_kept(apt):
    first(apt, "--dense-scores")
    assert apt(*PLAIN, "--size", "experts=3", "--dense-scores", "-o", "other").code == 0
    scores = [
        {name: entry["scores"] for name, entry in report(place)["structure"]["experts"].items()}
        for place in ("first", "other")
    ]
    assert scores[0] == scores[1]


def test_a_second_result_serves_a_third_and_is_streamed(apt):
    first(apt, "--dense-scores")
    for place, words in (("second", ()), ("third", ("--stream",))):
        source = "first" if place == "second" else "second"
        options = ("--from", source, "--size", "experts=5", *words, "-o", place)
        result = apt("shrink", "zoo:moe", *options)
        assert result.code == 0, result.err
    assert same("second", "third")


def test_protection_is_by_the_weights_in_the_report(apt):
    first(apt, "--dense-scores")
    protect = ("--size", "experts=4", "--protect", "builtin:wiki")
    assert apt(*PLAIN, *protect, "--dense-scores", "-o", "whole").code == 0
    result = apt("shrink", "zoo:moe", "--from", "first", *SMALL, *protect, "-o", "second")
    assert result.code == 0, result.err
    assert same("whole", "second")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "hold only for its number of experts"),
        (("--method", "expert-joint"), "no scores of experts: its method expert-joint"),
        (("--dense-scores", "--method", "expert-merge"), "were merged, which needs a calibration"),
    ],
)
def test_scores_that_serve_no_other_number_are_refused(apt, options, message):
    first(apt, *options)
    result = apt("shrink", "zoo:moe", "--from", "first", "--size", "experts=4", "-o", "second")
    assert result.code == 2
    assert message in result.err
    assert len(result.err.splitlines()) == 1
    assert not Path("second").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "experts=4", "--compensate"), "exact weights need a calibration"),
        (("--size", "experts=4", "--drop", 1), "only experts are removed"),
        (("--keep", 0.5), "only a number of experts can be chosen"),
        (("--size", "experts=4", "--method", "reap"), "expert-effect computed the scores"),
        (("--size", "expert-channels=0.5"), "chooses experts, and none are removed here"),
    ],
)
def test_what_needs_a_calibration_is_refused(apt, words, message):
    first(apt, "--dense-scores")
    result = apt("shrink", "zoo:moe", "--from", "first", *words, "-o", "second")
    assert result.code == 2
    assert message in result.err
    assert not Path("second").exists()


def test_scores_of_other_weights_are_refused(apt):
    first(apt, "--dense-scores")
    path = Path("first/apt_report.json")
    path.write_text(path.read_text().replace(report("first")["model"]["sha256"], "0" * 64))
    result = apt("shrink", "zoo:moe", "--from", "first", "--size", "experts=4", "-o", "second")
    assert result.code == 2
    assert "first is the output for other weights" in result.err
    assert not Path("second").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "experts=8", "--method", "expert-joint"), "does not score experts one by one"),
        (("--size", "experts=8", "--drop", 3), "not known where blocks are dropped"),
        (("--size", "expert-channels=0.5"), "dense scores has no effect: no experts"),
    ],
)
def test_dense_scores_that_would_not_be_used_are_refused(apt, words, message):
    result = apt(*PLAIN, *words, "--dense-scores", "-o", "out")
    assert result.code == 2
    assert message in result.err


def test_a_streamed_run_with_dense_scores_is_resumed(apt, monkeypatch):
    words = (*PLAIN, "--size", "experts=6", "--dense-scores")
    assert apt(*words, "-o", "whole").code == 0
    with monkeypatch.context() as patch:
        cut(patch, PLACES["journal"], 4, KilledError())
        with pytest.raises(KilledError):
            apt(*words, "--stream", "-o", "streamed")
    assert apt(*words, "--stream", "--resume", "-o", "streamed").code == 0
    assert same("whole", "streamed")
    assert report("whole")["structure"] == report("streamed")["structure"]
