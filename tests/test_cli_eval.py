"""What ``apt-prune eval`` refuses, and what it says of a model that gives no numbers."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from apt.cli.summary import first_not_finite

WINDOWS = ("--samples", 2, "--seqlen", 64)


@pytest.fixture
def changed(checkpoint, tmp_path):
    """A function that copies a checkpoint with every tensor changed by a function of its name."""

    def write(change, variant="llama"):
        path = Path(shutil.copytree(checkpoint(variant), tmp_path / "changed"))
        tensors = load_file(path / "model.safetensors")
        changed = {name: change(name, value).contiguous() for name, value in tensors.items()}
        save_file(changed, path / "model.safetensors", {"format": "pt"})
        return path

    return write


@pytest.fixture
def overflowing(changed):
    """A model with finite weights whose outputs are not."""
    return changed(lambda name, value: value * 1e30 if "proj" in name else value)


@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=["memory", "stream"])
def test_a_measure_that_is_no_number_is_status_1(apt, overflowing, stream):
    run = apt("eval", overflowing, *WINDOWS, *stream, "--quiet")
    assert run.code == 1
    assert "perplexity nan" in run.out
    assert f"{overflowing} has no perplexity on builtin: its outputs there are not" in run.err
    run = apt("eval", overflowing, *WINDOWS, *stream, "--json")
    assert run.code == 1
    assert json.loads(run.out, parse_constant=lambda name: pytest.fail(name))["perplexity"] == "NaN"


@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=["memory", "stream"])
def test_tokens_without_an_embedding_are_refused(apt, changed, stream):
    path = changed(lambda name, v: v[:512] if "embed" in name or "lm_head" in name else v)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": 512}))
    run = apt("eval", path, *WINDOWS, *stream)
    assert run.code == 2
    assert "but the model has 512 embeddings; the tokenizer belongs to another model" in run.err


@pytest.mark.parametrize("command", ["eval", "inspect", "prune"])
def test_another_familys_adapter_is_refused(apt, command):
    run = apt(command, "zoo:llama", "--adapter", "mamba", *WINDOWS)
    assert run.code == 2
    assert "MambaAdapter does not fit LlamaForCausalLM" in run.err


def test_a_report_that_is_nested_too_deeply_is_one_line(apt, checkpoint, tmp_path):
    path = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    (path / "apt_report.json").write_text("[" * 100_000)
    run = apt("verify", path, "--pattern", "2:4")
    assert run.code == 2
    assert "apt_report.json is nested too deeply" in run.err


def test_scores_of_a_run_that_are_no_numbers_are_found():
    sound, nan = {"perplexity": 12.5}, {"perplexity": float("nan")}
    names = ("perplexity",)
    assert first_not_finite({}, names) is None
    assert first_not_finite({"before": sound, "after": sound}, names) is None
    assert first_not_finite({"before": sound, "after": nan}, names) == "perplexity after pruning"
    assert first_not_finite({"before": nan, "after": nan}, names) == "perplexity before pruning"
