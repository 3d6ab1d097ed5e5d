"""The same results on a GPU; skipped, with the reason, where there is none."""

import copy
import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import apt as library
from apt.errors import AptError
from apt.solver import NM, Gram, SolverOptions, Unstructured, admm, mm, relative_layer_error, sm, ss
from apt.solver.patterns import meets
from tests.helpers.families import FAMILIES, random_model, random_tokens
from tests.helpers.problems import problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("method", [ss, sm, mm])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_layers_are_solved_as_on_the_cpu(method, pattern):
    weight, gram = problem(0, 64, 128)
    there = Gram.from_sum(gram.matrix.cuda(), gram.tokens)
    here = method(weight, gram, pattern, SolverOptions())
    found = method(weight.cuda(), there, pattern, SolverOptions())
    assert torch.equal(found.mask.cpu(), here.mask)
    torch.testing.assert_close(found.weight.cpu(), here.weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_masks_are_searched_as_well_as_on_the_cpu(pattern):
    weight, gram = problem(2, 64, 128)
    there = Gram.from_sum(gram.matrix.cuda(), gram.tokens)
    here = admm(weight, gram, pattern, SolverOptions())
    found = admm(weight.cuda(), there, pattern, SolverOptions())
    errors = [
        relative_layer_error(weight, solution.weight.cpu(), gram.matrix)
        for solution in (here, found)
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", FAMILIES.values())
def test_models_are_pruned_as_on_the_cpu(variant, dtype):
    tokens, errors = random_tokens(samples=8), []
    for device in ("cpu", "cuda"):
        model = random_model(variant, dtype).to(device)
        report = library.prune(model, tokens, pattern="2:4")
        errors.append(report.relative_layer_error)
        for name, parameter in model.named_parameters():
            if f"{name.removesuffix('.weight')}" in {site.name for site in report.sites}:
                assert meets(parameter, NM(2, 4))
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


@pytest.mark.parametrize("where", ["memory", "cpu", "disk"])
def test_a_streamed_run_reads_ahead_and_prunes_as_on_the_cpu(where, checkpoint, apt):
    command = ("prune", checkpoint("llama"), "--samples", 4, "--seqlen", 24, "--pattern", "2:4")
    errors = []
    for device in ("cpu", "cuda"):
        options = ("--stream", "--activations", where, "--device", device, "-o", device)
        result = apt(*command, *options)
        assert result.code == 0, result.err
        report = json.loads((Path(device) / "apt_report.json").read_text())
        errors.append(sum(site["relative_error"] for site in report["sites"]))
    assert errors[0] == pytest.approx(errors[1], rel=0.05)
    assert apt("verify", "cuda").code == 0


def test_a_model_writes_the_same_text_again():
    model = random_model("llama").cuda()
    first, again = (library.own_text(model, 3, 40, seed=1) for _ in range(2))
    assert first.device.type == "cpu"
    assert torch.equal(first, again)
    assert int(first.max()) < model.config.vocab_size


def test_metrics_are_measured_block_by_block_as_on_the_cpu(checkpoint, apt):
    command = ("eval", checkpoint("llama"), "--samples", 4, "--seqlen", 24, "--json")
    known = json.loads(apt(*command, "--device", "cpu").out)
    found = json.loads(apt(*command, "--device", "cuda", "--stream").out)
    assert found["perplexity"] == pytest.approx(known["perplexity"], rel=1e-3)


def test_tf32_does_not_reach_the_solver():
    weight, gram = problem(1, 64, 128)
    weight, matrix = weight.float().cuda(), gram.matrix.float().cuda()
    plain = sm(weight, Gram.from_sum(matrix, gram.tokens), NM(2, 4), SolverOptions())
    torch.set_float32_matmul_precision("high")
    try:
        found = sm(weight, Gram.from_sum(matrix, gram.tokens), NM(2, 4), SolverOptions())
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(plain.weight, found.weight)


@pytest.mark.parametrize("kind", ["spp", "lora", "layers", "distill"])
def test_a_recovery_keeps_every_zero(kind):
    model = random_model("llama").cuda()
    dense = copy.deepcopy(model)
    library.prune(model, random_tokens(), pattern="2:4", method="wanda")
    before = {n: p == 0 for n, p in model.named_parameters() if "proj" in n}
    options = library.RecoverOptions(steps=4, checks=2, batch=4, rate=1e-2, hidden=0.1)
    tokens = torch.arange(24 * 16).reshape(24, 16) % 50
    with suppress(AptError):  # a few steps need not help a random model
        library.recover(model, tokens, kind=kind, options=options, dense=dense)
    for name, mask in before.items():
        assert torch.equal(model.get_parameter(name) == 0, mask), name
        assert model.get_parameter(name).is_cuda


def test_tokens_may_be_on_the_gpu_beside_generated_text():
    tokens, options = random_tokens(samples=6).cuda(), library.PruneOptions(own_samples=2)
    report = library.prune(random_model("llama").cuda(), tokens, pattern="2:4", options=options)
    assert report.calibration["shape"] == [8, 24]
    search = library.ShrinkOptions(mode="search", multiple_of=8)
    small, _ = library.shrink(random_model("llama").cuda(), tokens, size=search, options=options)
    assert next(small.parameters()).is_cuda
