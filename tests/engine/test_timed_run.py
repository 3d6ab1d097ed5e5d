"""A pruning of a given time: effort and samples become smaller, and a distillation follows."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

import apt as library
from apt.checkpoints.load import load, open_skeleton
from apt.engine import opening, recover_task, timed_run
from apt.engine.costs import Machine
from apt.engine.prune_model import Pruning
from apt.engine.recipes import recipe_of
from apt.locations.model_source import find
from apt.planning.plan import Selection, make_plan, read_pattern
from apt.plugin.registry import registry
from apt.recovery import recover as recovery
from apt.solver.admm_search import admm
from apt.text.augmentation import Augmentation
from tests.helpers import TEXT


@pytest.fixture(scope="module")
def job():
    """The model and the pruning of a run."""
    skeleton = open_skeleton(find("zoo:llama", registry()), registry())
    half = read_pattern("0.5")
    plan = make_plan(skeleton.module, skeleton.adapter, half, Selection(), None)
    recipe = recipe_of(library.PruneOptions(), registry().methods.get("admm"))
    return skeleton, Pruning(skeleton.adapter, plan, admm, recipe, Augmentation())


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(timed_run, "measure_machine", lambda device: Machine(5e10, 1e11, 2e10))


@pytest.mark.parametrize(
    ("minutes", "given", "fits"),
    [
        (1000, {}, ("default", 128, 2048)),
        (1000, {"samples": 3, "seqlen": 100}, ("default", 3, 100)),
        (1, {}, ("default", 64, 512)),
        (1, {"seqlen": 256}, ("default", 128, 256)),
        (0.2, {}, ("fast", 16, 512)),
        (1e-6, {}, ("fast", 8, 512)),  # never less
        (1e-6, {"samples": 2, "seqlen": 100}, ("fast", 2, 100)),
        (1e-6, {"effort": "best"}, ("best", 32, 512)),  # the effort that was asked for
    ],
)
def test_effort_and_samples_become_smaller_until_they_fit(job, machine, minutes, given, fits):
    lines = []
    requested = library.PruneRun(model="zoo:llama", sparsity=0.5, minutes=minutes, **given)
    method = registry().methods.get("admm")
    found = timed_run.fit_to_time(requested, *job, method, "cpu", lines.append)
    assert (found.effort, found.samples, found.seqlen) == fits
    assert lines == [
        f"minutes: {minutes:g}: effort {fits[0]}, {fits[1]} samples of {fits[2]} tokens, "
        "then distillation"
    ]


def test_method_without_efforts_has_fewer_samples(job, machine):
    requested = library.PruneRun(model="zoo:llama", sparsity=0.5, minutes=1e-6)
    found = timed_run.fit_to_time(requested, *job, registry().methods.get("wanda"), "cpu", print)
    assert (found.effort, found.samples, found.seqlen) == ("default", 8, 512)


@pytest.mark.parametrize(("width", "rate"), [(128, 4e-4), (576, 4e-4), (4608, 5e-5)])
def test_wider_model_is_trained_with_a_lower_rate(job, width, rate):
    skeleton = replace(job[0], config=LlamaConfig(hidden_size=width))
    requested = library.PruneRun(model="zoo:llama", sparsity=0.5, minutes=9, output=Path("out"))
    training = timed_run.training_of(requested, skeleton, registry(), "cpu").options
    assert training.rate == pytest.approx(rate)
    assert training.batch is None  # chosen by the time


WORDS = ("--sparsity", 0.7, "--method", "wanda", "--samples", 4, "--seqlen", 64,
         "--save-masks", "--eval", TEXT)  # fmt: skip


def test_rest_of_the_time_is_spent_on_distillation(apt, monkeypatch):
    """The number of steps is fixed to 8. All zeros stay, and no further zeros appear."""
    monkeypatch.setattr(recovery, "_steps_in", lambda seconds, *_: (8, 4, 8))
    plain = apt("prune", "zoo:llama", *WORDS, "-o", "plain")
    run = apt("prune", "zoo:llama", *WORDS, "--minutes", 9, "-o", "timed")
    assert (plain.code, run.code) == (0, 0), run.err
    assert "loss on the samples held back: " in run.out
    report = library.Report.read(Path("timed"))
    training = report.recovery["training"]
    assert report.recovery["options"]["kind"] == "distill"
    assert report.options["minutes"] == 9
    assert 8 < report.recovery["options"]["minutes"] < 9
    losses = dict(training["held_back"])
    assert losses[training["best"]] < losses[0]
    assert report.scores["after"]["perplexity"] < library.Report.read(
        Path("plain")).scores["after"]["perplexity"]  # fmt: skip
    masks = [library.checkpoints.masks.read_masks(Path(n) / "apt_masks.safetensors") for n in
             ("plain", "timed")]  # fmt: skip
    assert masks[0].keys() == masks[1].keys()
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert apt("verify", "timed").code == 0
    assert load(open_skeleton(find("timed", registry()), registry())).module is not None


def test_training_also_reads_the_text_that_the_model_generated(apt, monkeypatch):
    trained = []
    monkeypatch.setattr(recovery, "_steps_in", lambda seconds, *_: (2, 1, 2))
    monkeypatch.setattr(
        recover_task, "recover_model", lambda model, tokens, job: trained.append(tokens)
        or recovery.recover_model(model, tokens, job))  # fmt: skip
    for own in (0, 2):
        apt("prune", "zoo:llama", *WORDS, "--minutes", 9, "--own-samples", own, "-o", f"own{own}")
    without, beside = trained
    assert len(beside) == len(without) + 4  # two samples, each twice
    assert torch.equal(beside[:3], without[:3])
    assert not (without == beside[3]).all(1).any()


def test_training_without_time_is_left_out_with_a_notice(apt):
    run = apt("prune", "zoo:llama", *WORDS, "--minutes", 1e-6, "-o", "out")
    assert run.code == 0, run.err
    assert "no time was left for the training" in run.out
    report = json.loads(Path("out/apt_report.json").read_text())
    assert report["problems"] == ["no time was left for the training"]
    assert report["recovery"] == {}


@pytest.mark.parametrize("other", [("--stream",), ("--quantize", "int8"), ("--samples", 0)])
def test_options_that_exclude_a_training_are_refused(apt, other):
    own = ("--own-samples", 2) if other[0] == "--samples" else ()
    run = apt("prune", "zoo:llama", "--minutes", 1, *other, *own, "-o", "out")
    assert run.code == 2
    assert run.err.count("\n") == 1
    assert other[0] in run.err
    assert "--minutes" in run.err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "words", [("prune", "zoo:llama", "--minutes", 1), ("recover", "zoo:llama")]
)
def test_training_without_its_packages_is_refused(apt, monkeypatch, words):
    monkeypatch.setattr(opening, "find_spec", lambda name: None if name == "peft" else True)
    run = apt(*words, "-o", "out")
    assert run.code == 2
    assert "a training needs peft" in run.err
    assert "apt-prune[recover]" in run.err
    with pytest.raises(library.AptError, match="a training needs peft"):
        library.run(library.RecoverRun(model="zoo:llama", output=Path("out")))
