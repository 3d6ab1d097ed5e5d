"""The same results on an accelerator of any kind; skipped, with the reason, where there is none.

`make device` runs these tests on one that torch simulates: it needs no hardware.
"""

import copy
import json
import pickle
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import apt as library
from apt import devices
from apt.distributed.ranks import Ranks
from apt.plugin.registry import registry
from apt.recovery.recover import NotRecoveredError
from apt.solver import (
    NM,
    Gram,
    SolverOptions,
    Unstructured,
    admm,
    meets,
    mm,
    relative_layer_error,
    sm,
    ss,
)
from tests.helpers.families import FAMILIES, random_model, random_tokens
from tests.helpers.problems import problem

DEVICE = devices.accelerator()
pytestmark = pytest.mark.skipif(DEVICE is None, reason="no accelerator")


@pytest.mark.parametrize("method", [ss, sm, mm])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_solutions_equal_those_on_the_cpu(method, pattern):
    weight, gram = problem(0, 64, 128)
    there = Gram.from_sum(gram.matrix.to(DEVICE), gram.tokens)
    here = method(weight, gram, pattern, SolverOptions())
    found = method(weight.to(DEVICE), there, pattern, SolverOptions())
    assert torch.equal(found.mask.cpu(), here.mask)
    torch.testing.assert_close(found.weight.cpu(), here.weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_masks_are_as_good_as_on_the_cpu(pattern):
    weight, gram = problem(2, 64, 128)
    there = Gram.from_sum(gram.matrix.to(DEVICE), gram.tokens)
    here = admm(weight, gram, pattern, SolverOptions())
    found = admm(weight.to(DEVICE), there, pattern, SolverOptions())
    errors = [
        relative_layer_error(weight, solution.weight.cpu(), gram.matrix)
        for solution in (here, found)
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", FAMILIES.values())
def test_pruned_models_equal_those_on_the_cpu(variant, dtype):
    tokens, errors = random_tokens(samples=8), []
    for device in ("cpu", DEVICE):
        model = random_model(variant, dtype).to(device)
        report = library.prune(model, tokens, pattern="2:4")
        errors.append(report.relative_layer_error)
        for name, parameter in model.named_parameters():
            if f"{name.removesuffix('.weight')}" in {site.name for site in report.sites}:
                assert meets(parameter, NM(2, 4))
    # In bf16, the scan of Mamba on a CPU rounds in other places than the one on a device.
    tolerance = 0.05 if dtype == torch.float32 else 0.1
    assert errors[0] == pytest.approx(errors[1], rel=tolerance)


@pytest.mark.parametrize("where", ["memory", "cpu", "disk"])
def test_streamed_run_reads_ahead_and_equals_the_one_on_the_cpu(where, checkpoint, apt):
    command = ("prune", checkpoint("llama"), "--samples", 4, "--seqlen", 24, "--pattern", "2:4")
    errors = []
    for device in ("cpu", DEVICE):
        options = ("--stream", "--activations", where, "--device", device, "-o", device)
        result = apt(*command, *options)
        assert result.code == 0, result.err
        report = json.loads((Path(device) / "apt_report.json").read_text())
        errors.append(sum(site["relative_error"] for site in report["sites"]))
    assert errors[0] == pytest.approx(errors[1], rel=0.05)
    assert apt("verify", DEVICE).code == 0


def test_own_text_is_reproducible():
    model = random_model("llama").to(DEVICE)
    first, again = (library.own_text(model, 3, 40, seed=1) for _ in range(2))
    assert first.device.type == "cpu"
    assert torch.equal(first, again)
    assert int(first.max()) < model.config.vocab_size


def test_streamed_metrics_equal_those_on_the_cpu(checkpoint, apt):
    command = ("eval", checkpoint("llama"), "--samples", 4, "--seqlen", 24, "--json")
    known = json.loads(apt(*command, "--device", "cpu").out)
    found = json.loads(apt(*command, "--device", DEVICE, "--stream").out)
    assert found["perplexity"] == pytest.approx(known["perplexity"], rel=1e-3)


def test_solver_runs_without_tf32():
    weight, gram = problem(1, 64, 128)
    weight, matrix = weight.float().to(DEVICE), gram.matrix.float().to(DEVICE)
    plain = sm(weight, Gram.from_sum(matrix, gram.tokens), NM(2, 4), SolverOptions())
    torch.set_float32_matmul_precision("high")
    try:
        found = sm(weight, Gram.from_sum(matrix, gram.tokens), NM(2, 4), SolverOptions())
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(plain.weight, found.weight)


@pytest.mark.parametrize("kind", ["spp", "lora", "layers", "distill"])
def test_recovery_trains_on_the_device_and_keeps_every_zero(kind):
    model = random_model("llama").to(DEVICE)
    dense = copy.deepcopy(model)
    library.prune(model, random_tokens(), pattern="2:4", method="wanda")
    before = {n: p == 0 for n, p in model.named_parameters() if "proj" in n}
    more = {"hidden": 0.1} if kind == "distill" else {}
    options = library.RecoverOptions(steps=4, checks=2, batch=4, rate=1e-2, **more)
    tokens = torch.arange(24 * 16).reshape(24, 16) % 50
    seen = set()
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda module, args: seen.add(args[0].device.type))
    with suppress(NotRecoveredError):  # a few steps need not help a random model
        library.recover(model, tokens, kind=kind, options=options, dense=dense)
    assert seen == {DEVICE}
    for name, mask in before.items():
        assert torch.equal(model.get_parameter(name) == 0, mask), name
        assert model.get_parameter(name).device.type == DEVICE


def test_tokens_on_the_device_are_accepted_with_own_text():
    tokens, options = random_tokens(samples=6).to(DEVICE), library.PruneOptions(own_samples=2)
    report = library.prune(random_model("llama").to(DEVICE), tokens, pattern="2:4", options=options)
    assert report.calibration["shape"] == [8, 24]
    search = library.ShrinkOptions(mode="search", multiple_of=8)
    small, _ = library.shrink(
        random_model("llama").to(DEVICE), tokens, size=search, options=options
    )
    assert next(small.parameters()).device.type == DEVICE


@pytest.mark.parametrize("method", sorted(registry().methods.specs))
def test_methods_are_as_good_as_on_the_cpu(method):
    errors = []
    for device in ("cpu", DEVICE):
        model = random_model("llama").to(device)
        report = library.prune(model, random_tokens(), pattern="2:4", method=method)
        errors.append(report.relative_layer_error)
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_permuted_and_quantised_weights_are_as_good_as_on_the_cpu(quantize):
    errors, options = [], library.PruneOptions(quantize=quantize, scale_group=64, effort="fast")
    for device in ("cpu", DEVICE):
        model = random_model("llama").to(device)
        report = library.prune(model, random_tokens(), pattern="4:8", options=options)
        assert any(site.order for site in report.sites)
        errors.append(report.relative_layer_error)
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


class _Apart(Ranks):
    """A rank whose objects are pickled, as for another rank with another device."""

    def share(self, value, owner=0):
        if isinstance(value, torch.Tensor):
            assert value.device.type == "cpu"
        return pickle.loads(pickle.dumps(value))


def test_ranks_share_tensors_on_the_cpu():
    model = random_model("llama").to(DEVICE)
    library.prune(model, random_tokens(), pattern="2:4", ranks=_Apart())
    assert all(meets(w, NM(2, 4)) for n, w in model.named_parameters() if "proj" in n)


def test_random_states_of_all_devices_are_restored(monkeypatch):
    monkeypatch.setattr(torch.random, "_fork_rng_warned_already", False)
    before = [torch.get_rng_state(), devices.random_state()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with devices.keep_random_states():
            torch.rand(3, device=DEVICE)
            torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(devices.random_state(), before[1])


def test_latency_of_a_smaller_model_is_measured(checkpoint, apt):
    command = ("shrink", checkpoint("llama"), "--samples", 4, "--seqlen", 24, "--width-only")
    run = apt(*command, "--budget", "latency", "--multiple-of", 8, "--device", DEVICE, "-o", "out")
    assert run.code == 0, run.err
