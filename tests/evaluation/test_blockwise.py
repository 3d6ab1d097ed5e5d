"""Metrics of a model that is read block by block, against a model in memory."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from apt.checkpoints.load import load, open_skeleton
from apt.errors import AptError
from apt.evaluation.blockwise import streamed
from apt.locations.model_source import find
from apt.plugin.registry import registry
from tests.helpers import TEXT
from tests.helpers.families import CONFIGS, random_tokens
from tests.helpers.releases import needs

MEASURED = ("--eval", TEXT, "--metric", "perplexity", "--metric", "accuracy")
COMMAND = (
    *("--samples", 4, "--seqlen", 24, "--pattern", "2:4", "--effort", "fast"),
    *("--calibration", TEXT, *MEASURED),
)


def scores(folder):
    return json.loads((Path(folder) / "apt_report.json").read_text())["scores"]


@pytest.fixture
def skeleton(checkpoint):
    return lambda variant: open_skeleton(find(str(checkpoint(variant)), registry()), registry())


@pytest.mark.parametrize("variant", CONFIGS)
@torch.no_grad()
def test_streamed_model_gives_the_logits_of_the_model_in_memory(variant, skeleton):
    tokens = random_tokens(samples=5, seqlen=16)
    model = load(skeleton(variant)).module
    with streamed(skeleton(variant), tokens, "cpu") as module:
        for rows in ([0, 1, 2, 3, 4], [4, 0], [3, 3]):
            given, expected = module(tokens[rows]).logits, model(tokens[rows]).logits
            torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
        named = module(input_ids=tokens[:2], use_cache=False).logits
        torch.testing.assert_close(named, model(tokens[:2]).logits, rtol=1e-4, atol=1e-4)
        blocks = [block for _, block in skeleton(variant).adapter.blocks(module)]
        assert [next(block.parameters()).is_meta for block in blocks] == [True, True, False]
    assert next(blocks[-1].parameters()).is_meta
    assert "forward" not in vars(blocks[0])


def test_tokens_that_are_not_windows_are_refused(skeleton):
    tokens = random_tokens(samples=2, seqlen=16)
    with (
        streamed(skeleton("llama"), tokens, "cpu") as module,
        pytest.raises(AptError, match="none of the given windows"),
    ):
        module(tokens[:, :8])


@pytest.mark.parametrize("activations", ["memory", "disk"])
def test_streamed_run_reports_the_scores_of_a_run_in_memory(activations, checkpoint, apt):
    model = checkpoint("llama-grouped-tied")
    assert apt("prune", model, *COMMAND, "-o", "memory").code == 0
    streamed = ("--stream", "--activations", activations)
    result = apt("prune", model, *COMMAND, *streamed, "-o", "disk")
    assert result.code == 0, result.err
    assert "perplexity on" in result.out
    known, found = scores("memory"), scores("disk")
    for when in ("before", "after"):
        assert found.pop(when) == pytest.approx(known.pop(when), rel=1e-5)
    assert found == known


def test_resumed_run_measures_nothing_again(checkpoint, apt, monkeypatch):
    command = ("prune", checkpoint("llama"), *COMMAND, "--stream")
    assert apt(*command, "-o", "whole").code == 0
    statuses = []
    monkeypatch.setattr(
        "apt.cli.progress.PruningProgress.status", lambda self, line: statuses.append(line)
    )

    def failing(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("apt.engine.run_output.RunOutput._record", failing)
        assert apt(*command, "-o", "out").code == 130
    assert sum("measuring" in line for line in statuses) == 4
    statuses.clear()
    assert apt(*command, "-o", "out", "--resume").code == 0
    assert not any("measuring" in line for line in statuses)
    assert scores("out") == scores("whole")


def test_resume_with_another_evaluation_text_is_refused(checkpoint, apt, monkeypatch):
    text = Path("text.txt")
    text.write_text(TEXT.read_text())
    command = ["prune", checkpoint("llama"), *COMMAND, "--stream", "-o", "out"]
    command[command.index("--eval") + 1] = text
    with monkeypatch.context() as patch:
        patch.setattr("apt.engine.run_output.RunOutput.verify", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            apt(*command)
    text.write_text(TEXT.read_text()[::-1])
    result = apt(*command, "--resume")
    assert result.code == 2
    assert "evaluation differ" in result.err


def test_streamed_eval_gives_the_same_perplexity(checkpoint, apt):
    model = checkpoint("opt")
    command = ("eval", model, "--data", TEXT, "--samples", 4, "--seqlen", 24, "--json")
    known = json.loads(apt(*command).out)
    result = json.loads(apt(*command, "--stream").out)
    assert result.pop("perplexity") == pytest.approx(known.pop("perplexity"), rel=1e-5)
    assert result == known


def test_eval_refuses_to_stream_unsuitable_models(apt, tmp_path, checkpoint):
    refused = apt("eval", "zoo:llama", "--stream", "--dtype", "bfloat16")
    assert refused.code == 2
    assert "dtype needs the whole model" in refused.err
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(checkpoint("llama") / "config.json", bare)
    refused = apt("eval", bare, "--stream")
    assert refused.code == 2
    assert "only safetensors can be streamed" in refused.err


@needs("transformers", "5.24", "Zaya, HY 4, keys and values for later layers")
@pytest.mark.parametrize("kind", ["zaya", "hy_v4", "gemma3n_text"])
@torch.no_grad()
def test_other_values_of_blocks_reach_the_last_block(tiny, kind, tmp_path):
    tiny.model(kind).save_pretrained(tmp_path)
    tokens = tiny.tokens(samples=5, seqlen=16)
    source = find(str(tmp_path), registry())
    model = load(open_skeleton(source, registry(), "auto")).module
    with streamed(open_skeleton(source, registry(), "auto"), tokens, "cpu") as module:
        for rows in ([0, 1, 2, 3, 4], [4, 0]):
            given, expected = module(tokens[rows]).logits, model(tokens[rows]).logits
            torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
