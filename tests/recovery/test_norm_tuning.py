"""Norm tuning: vectors alone change, towards the dense model, or everything is as before."""

import copy
import json
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import apt as library
from apt.checkpoints.load import load, load_tokenizer, open_skeleton
from apt.engine.caller_model import find_adapter
from apt.engine.text import Text, other_windows
from apt.locations.model_source import find
from apt.plugin.registry import registry
from apt.recovery.norm_tuning import DenseOutputs, NormTuning, tune_norms
from apt.testing import embedded
from tests.helpers import TEXT
from tests.helpers.families import random_model, random_tokens

FEW = NormTuning(4, rate=2e-2)


@cache
def once_pruned(name):
    """A pruned model, its adapter and the outputs of the dense model."""
    model = random_model(name)
    adapter = find_adapter(None, model, registry())[1]
    tokens = random_tokens(samples=16)
    outputs = DenseOutputs.of(model, adapter, tokens, "float32")
    library.prune(model, tokens, pattern="0.8", method="wanda")
    return model, adapter, outputs


def pruned(name="llama"):
    model, adapter, outputs = once_pruned(name)
    return copy.deepcopy(model), adapter, outputs


def changed(before, after):
    """The names of the tensors that differ."""
    pairs = zip(before.items(), after.values(), strict=True)
    return {name for (name, one), other in pairs if not torch.equal(one, other)}


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", ["llama", "opt", "bloom", "mamba"])
def test_vectors_alone_change_and_the_divergence_falls(name):
    model, adapter, outputs = pruned(name)
    before = state(model)
    tuned = tune_norms(model, adapter, outputs, FEW, "float32")
    assert tuned.kept
    assert tuned.divergence[1] < tuned.divergence[0]
    found = changed(before, state(model))
    assert found <= {*tuned.names}
    assert len(found) > sum(bool(before[name].any()) for name in tuned.names) / 2
    assert all(before[name].ndim == 1 for name in tuned.names)
    with torch.no_grad():
        last = outputs.divergence(model, range(14, 16))  # an eighth is measured
    torch.testing.assert_close(float(last), tuned.divergence[1], rtol=1e-4, atol=1e-7)


def test_modes_and_gradients_are_as_before():
    model, adapter, outputs = pruned()
    model.train()
    model.lm_head.weight.requires_grad_(False)
    modes = [part.training for part in model.modules()]
    needed = [parameter.requires_grad for parameter in model.parameters()]
    tune_norms(model, adapter, outputs, FEW, "float32")
    assert [part.training for part in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == needed
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("rate", [1e3, 1e6])
def test_a_training_that_does_not_help_changes_nothing(rate):
    model, adapter, outputs = pruned()
    before = state(model)
    tuned = tune_norms(model, adapter, outputs, NormTuning(2, rate=rate), "float32")
    assert not tuned.kept
    assert not changed(before, state(model))


def test_an_interruption_changes_nothing():
    model, adapter, outputs = pruned()
    before, steps = state(model), iter(range(2))
    with pytest.raises(StopIteration):
        tune_norms(model, adapter, outputs, FEW, "float32", progress=lambda: next(steps))
    assert not changed(before, state(model))


def test_fixed_parameters_do_not_change_and_values_are_of_the_stored_dtype():
    model, adapter, outputs = pruned()
    before, final = state(model), model.model.norm.weight
    dtypes = dict.fromkeys(dict(model.named_parameters()), torch.bfloat16)
    tuned = tune_norms(
        model, adapter, outputs, FEW, "float32", fixed=[final], dtypes=dtypes
    )  # fmt: skip
    assert "model.norm.weight" not in changed(before, state(model)) | {*tuned.names}
    vectors = [model.get_parameter(name) for name in tuned.names]
    assert all(torch.equal(v, v.bfloat16().float()) for v in vectors)


def test_a_program_gets_the_record_and_a_model_of_the_same_zeros():
    tokens, options = random_tokens(samples=16), library.PruneOptions(compute="float32")
    given = {"pattern": "0.8", "method": "wanda"}
    plain, _ = library.prune_copy(random_model("llama"), tokens, options=options, **given)
    options = library.PruneOptions(norm_epochs=3, compute="float32")
    tuned, report = library.prune_copy(random_model("llama"), tokens, options=options, **given)
    assert report.norms["kept"]
    assert report.norms["vectors"] == sum(p.ndim == 1 for p in tuned.parameters())
    assert report.options["norm_epochs"] == 3
    assert (report.norms["shape"], report.norms["others"]) == ([*tokens.shape], 0)
    assert all(v.ndim == 1 for n, v in plain.state_dict().items() if n in
               changed(plain.state_dict(), tuned.state_dict()))  # fmt: skip


def test_other_tokens_of_a_program_give_the_norms_of_the_command_line(apt, checkpoint, tmp_path):
    ran = apt(
        "prune", checkpoint("llama"), "--sparsity", "0.7", "--calibration", TEXT, "--samples", "8",
        "--seqlen", "32", "--compute", "float32", "--output", tmp_path / "out",
    )  # fmt: skip
    assert ran.code == 0, ran
    source = find(str(checkpoint("llama")), registry())
    model, tokenizer = load(open_skeleton(source, registry())), load_tokenizer(source)
    tokens = library.calibration_tokens(tokenizer, str(TEXT), samples=8, seqlen=32)
    others = library.other_tokens(tokenizer, str(TEXT), samples=8, seqlen=32)
    report = library.prune(
        model.module, tokens, pattern="0.7", other_tokens=others, tokenizer=tokenizer,
        options=library.PruneOptions(compute="float32"),
    )  # fmt: skip
    assert report.norms["others"] == len(others) == 8
    stored = load(open_skeleton(find(str(tmp_path / "out"), registry()), registry())).module
    for name, parameter in model.module.named_parameters():
        expected = stored.get_parameter(name)
        assert torch.equal(parameter.to(expected.dtype), expected), name


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (random_tokens(seqlen=17), "other tokens have windows of 17 tokens, and samples have 16"),
        (torch.full((2, 16), 10**6), "the tokenizer of these other tokens gives ids from 1000000"),
        (torch.ones(2, 16), "other tokens are torch.float32"),
        (torch.ones(16, dtype=torch.long), "other tokens have shape"),
    ],
)
def test_unusable_other_tokens_are_an_error(others, message):
    model, tokens = random_model("llama"), random_tokens(seqlen=16)
    before = state(model)
    with pytest.raises(library.AptError, match=message):
        library.prune(model, tokens, pattern="2:4", other_tokens=others)
    assert not changed(before, state(model))


def test_without_other_windows_norms_are_trained_on_the_samples():
    tokens = random_tokens(samples=16)
    report = library.prune(
        random_model("llama"), tokens, pattern="2:4", other_tokens=tokens[:0]
    )  # fmt: skip
    own = report.options["own_samples"]
    assert (report.norms["shape"], report.norms["others"]) == ([16 + own, tokens.shape[1]], 0)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_the_checkpoint_has_the_trained_norms(apt, checkpoint, tmp_path, dtype):
    model = checkpoint("llama")
    common = (
        "prune", model, "--sparsity", "0.7", "--method", "wanda", "--calibration", TEXT,
        "--samples", "8", "--seqlen", "32", "--dtype", dtype,
    )  # fmt: skip
    assert apt(*common, "--output", tmp_path / "plain").code == 0
    ran = apt(*common, "--output", tmp_path / "tuned", "--norm-epochs", "4")
    assert ran.code == 0, ran
    report = json.loads((tmp_path / "tuned" / "apt_report.json").read_text())
    assert report["norms"]["kept"]
    assert report["norms"]["shape"] == [8, 32]
    assert report["norms"]["others"] == 8
    before, after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("plain", "tuned")
    )
    found = changed(before, {name: after[name] for name in before})
    assert "model.norm.weight" in found
    assert all(before[name].ndim == 1 for name in found)
    assert apt("verify", tmp_path / "tuned").code == 0
    skeleton = open_skeleton(find(str(tmp_path / "tuned"), registry()), registry())
    assert torch.equal(load(skeleton).module.model.norm.weight, after["model.norm.weight"].float()
                       if dtype == "float32" else after["model.norm.weight"])  # fmt: skip


def test_short_text_is_filled_up_with_calibration_samples(apt, checkpoint, tmp_path):
    words = tmp_path / "short.txt"
    words.write_text(Path(TEXT).read_text()[:900])
    common = (
        "prune", checkpoint("llama"), "--sparsity", "0.7", "--method", "wanda", "--calibration",
        words, "--seqlen", "32", "--norm-epochs", "1",
    )  # fmt: skip
    ran = apt(*common, "--samples", "100", "--output", tmp_path / "out")
    windows = int(re.search(r"use (\d+) samples", ran.err)[1])
    samples = windows - 1
    assert apt(*common, "--samples", samples, "--output", tmp_path / "out").code == 0
    norms = json.loads((tmp_path / "out" / "apt_report.json").read_text())["norms"]
    assert (norms["shape"], norms["others"]) == ([samples, 32], 1)


def test_other_windows_with_unknown_tokens_are_refused():
    options = library.PruneRun(
        model="mine", sparsity=0.5, calibration="builtin", samples=4, seqlen=16
    )
    small = SimpleNamespace(module=torch.nn.Module())
    small.module.get_input_embeddings = lambda: torch.nn.Embedding(50, 2)
    text = Text(embedded("llama")[1])
    with pytest.raises(library.AptError, match="the tokenizer of mine gives ids from .* 50 embed"):
        other_windows(options, text, small, registry(), 1.0)


@pytest.mark.parametrize("option", ["--stream", "--resume"])
def test_a_streamed_run_refuses(apt, checkpoint, tmp_path, option):
    ran = apt(
        "prune", checkpoint("llama"), "--sparsity", "0.5", "--norm-epochs", "1", option,
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert ran.code == 2
    assert "norm epochs need the whole model in memory" in ran.err
    assert not (tmp_path / "out").exists()


def test_an_encoder_refuses(apt, tmp_path):
    ran = apt(
        "prune", "zoo:bert", "--sparsity", "0.5", "--norm-epochs", "1", "--output", tmp_path / "out"
    )
    assert ran.code == 2
    assert "norm epochs has no effect on Bert" in ran.err


def test_a_run_of_a_given_time_refuses(apt, checkpoint, tmp_path):
    ran = apt(
        "prune", checkpoint("llama"), "--sparsity", "0.5", "--norm-epochs", "1", "--minutes", "1",
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert ran.code == 2
    assert "minutes and norm epochs exclude each other" in ran.err
