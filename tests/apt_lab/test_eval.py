"""``apt-prune eval``: refused models and texts, results that are not finite, and dense models."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from apt_lab.evaluating import evaluate
from apt_lab.options import EvalRun
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import apt as apt_package
from apt.checkpoints.load import load_tokenizer
from apt.cli.summary import first_not_finite
from apt.errors import AptError
from apt.locations.model_source import find
from apt.plugin.registry import registry
from apt.text.datasets import digest, documents, evaluation_tokens
from tests.helpers import TEXT

WINDOWS = ("--samples", 2, "--seqlen", 64)


@pytest.fixture
def changed(checkpoint, tmp_path):
    """A function that copies a checkpoint with changed tensors."""

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
def test_metric_that_is_not_finite_gives_status_1(apt, overflowing, stream):
    run = apt("eval", overflowing, *WINDOWS, *stream, "--quiet")
    assert run.code == 1
    assert "perplexity nan" in run.out
    assert f"{overflowing} has no perplexity on builtin: its outputs there are not" in run.err
    run = apt("eval", overflowing, *WINDOWS, *stream, "--json")
    assert run.code == 1
    assert json.loads(run.out, parse_constant=lambda name: pytest.fail(name))["perplexity"] == "NaN"


@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=["memory", "stream"])
def test_tokens_outside_the_vocabulary_are_refused(apt, changed, stream):
    path = changed(lambda name, v: v[:512] if "embed" in name or "lm_head" in name else v)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": 512}))
    run = apt("eval", path, *WINDOWS, *stream)
    assert run.code == 2
    assert "but the model has 512 embeddings; the tokenizer belongs to another model" in run.err


@pytest.mark.parametrize("command", ["eval", "inspect", "prune"])
def test_wrong_adapter_is_refused(apt, command):
    run = apt(command, "zoo:llama", "--adapter", "mamba", *WINDOWS)
    assert run.code == 2
    assert "MambaAdapter does not fit LlamaForCausalLM" in run.err


def test_deeply_nested_report_is_an_error_of_one_line(apt, checkpoint, tmp_path):
    path = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    (path / "apt_report.json").write_text("[" * 100_000)
    run = apt("verify", path, "--pattern", "2:4")
    assert run.code == 2
    assert "apt_report.json is nested too deeply" in run.err


def test_first_not_finite_names_the_first_nonfinite_score():
    sound, nan = {"perplexity": 12.5}, {"perplexity": float("nan")}
    names = ("perplexity",)
    assert first_not_finite({}, names) is None
    assert first_not_finite({"before": sound, "after": sound}, names) is None
    assert first_not_finite({"before": sound, "after": nan}, names) == "perplexity after pruning"
    assert first_not_finite({"before": nan, "after": nan}, names) == "perplexity before pruning"


def test_eval_compares_a_pruned_model_with_the_dense_one(apt, checkpoint):
    dense = checkpoint("llama")
    pruned = apt("prune", dense, "--sparsity", 0.5, "--method", "wanda", "--samples", 4, "--seqlen",
                 16, "--calibration", TEXT, "-o", "out")  # fmt: skip
    assert pruned.code == 0, pruned.err
    both = ("--metric", "divergence", "--metric", "agreement")
    text = ("--data", TEXT, "--samples", 3, "--seqlen", 24, "--json")
    found = apt("eval", "out", *text, *both, "--dense", dense)
    assert found.code == 0, found.err
    record = json.loads(found.out)
    models = [AutoModelForCausalLM.from_pretrained(path) for path in ("out", dense)]
    tokenizer = load_tokenizer(find(str(dense), registry()))
    texts = documents(str(TEXT), "evaluation", registry())
    tokens = evaluation_tokens(tokenizer, texts, 3, 24, "the text")
    with torch.no_grad():
        logs = [model(tokens).logits[:, :-1].log_softmax(-1) for model in models]
    by_hand = (logs[1].exp() * (logs[1] - logs[0])).sum(-1).mean()
    assert record["divergence"] == pytest.approx(float(by_hand), rel=1e-4)
    same = (logs[0].argmax(-1) == logs[1].argmax(-1)).float().mean()
    assert record["agreement"] == pytest.approx(float(same))
    itself = json.loads(apt("eval", dense, *text, *both, "--dense", dense).out)
    assert itself["divergence"] == pytest.approx(0, abs=1e-6)
    assert itself["agreement"] == 1
    assert "dense" not in record
    assert 0 < record["spread"]["divergence"]["error"] < record["divergence"]


def test_eval_reports_the_perplexity_of_the_dense_model(apt, checkpoint):
    text = ("--data", TEXT, "--samples", 3, "--seqlen", 24)
    alone = [json.loads(apt("eval", m, *text, "--json").out) for m in ("zoo:llama", "zoo:opt")]
    given = ("eval", "zoo:llama", *text, "--dense", "zoo:opt")
    record = json.loads(apt(*given, "--json").out)
    assert record["perplexity"] == pytest.approx(alone[0]["perplexity"], rel=1e-5)
    assert record["dense"]["perplexity"] == pytest.approx(alone[1]["perplexity"], rel=1e-5)
    spread = record["spread"]["perplexity"]
    assert spread["low"] < record["perplexity"] < spread["high"]
    shown = apt(*given)
    assert shown.code == 0, shown.err
    assert f"{spread['low']:.3f} … {spread['high']:.3f}" in shown.out
    assert f"{record['dense']['perplexity']:.3f}" in shown.out


def test_metric_that_needs_the_dense_model_is_refused_without_it(apt, checkpoint):
    model, text = checkpoint("llama"), ("--data", TEXT, "--samples", 1, "--seqlen", 16)
    for arguments, message in (
        (("--metric", "divergence"), "name it (--dense)"),
        (("--dense", model, "--stream"), "dense needs the whole model in memory"),
        (("--metric", "agreement", "--dense", "nowhere"), "nowhere"),
    ):
        done = apt("eval", model, *text, *arguments)
        assert done.code == 2
        assert message in done.err
    done = apt("prune", model, "--metric", "divergence", "--eval", TEXT, "-o", "out")
    assert done.code == 2
    assert "measure it afterwards with apt-prune eval" in done.err


def test_evaluation_tokens_are_the_windows_of_the_command(apt, checkpoint):
    model = checkpoint("llama")
    record = json.loads(apt("eval", model, *WINDOWS, "--json").out)
    tokens = apt_package.evaluation_tokens(
        load_tokenizer(find(str(model), registry())), "builtin", samples=2, seqlen=64
    )
    assert digest(tokens) == record["tokens_sha256"]
    module = AutoModelForCausalLM.from_pretrained(model)
    assert apt_package.perplexity(module, tokens) == pytest.approx(record["perplexity"], rel=1e-4)


def test_evaluate_gives_the_result_of_the_command(apt, checkpoint):
    model, steps = str(checkpoint("llama")), []
    run = EvalRun(
        model=model, dense=model, data=str(TEXT), metrics=("perplexity", "agreement"),
        samples=2, seqlen=16, bos=False,
    )  # fmt: skip
    found = evaluate(run, steps.append)
    words = ("--dense", model, "--data", TEXT, "--samples", 2, "--seqlen", 16, "--no-bos")
    told = apt("eval", model, *words, "--metric", "perplexity", "--metric", "agreement", "--json")
    assert json.loads(told.out) == json.loads(json.dumps(found.record()))
    assert found.scores["agreement"].value == 1
    assert found.bos is found.not_finite is None
    assert steps[-1] == "measuring agreement on 32 tokens"
    with pytest.raises(AptError, match="samples is 0"):
        evaluate(replace(run, samples=0))
