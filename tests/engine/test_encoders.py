"""Runs on encoders of text: from a directory to a directory, in memory and streamed."""

import json

import pytest
import torch
from transformers import AutoTokenizer, BertForMaskedLM, BertModel, pipeline

import apt
from apt.checkpoints.load import open_skeleton
from apt.engine import timed_run
from apt.engine.costs import Machine
from apt.engine.prune_model import Pruning
from apt.engine.recipes import recipe_of
from apt.events import TrainingStep
from apt.locations.model_source import find
from apt.planning.plan import Selection, make_plan, read_pattern
from apt.plugin.registry import registry
from apt.recovery import recover as recovery
from apt.solver.admm_search import admm
from apt.text.augmentation import Augmentation
from apt.text.datasets import documents
from tests.helpers.stacked import MODELS, stacked_model

_RUN = {"samples": 12, "pattern": "2:4", "seqlen": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random BERT with the tokenizer of the embedded one, and the files of sentence encoders."""
    path = tmp_path_factory.mktemp("bert")
    tokenizer = AutoTokenizer.from_pretrained(find("zoo:bert", registry()).location)
    config = MODELS["bert"][1]()
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model = BertForMaskedLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # so that every path matters
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (path / "modules.json").write_text("[]")
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 24}')
    return path


@pytest.fixture
def texts(tmp_path):
    """Passages of the embedded text, one per line."""
    text = next(iter(documents("builtin", "calibration", registry())))
    rows = [{"text": part} for part in text.split("\n\n")[:60] if part.strip()]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_streamed_output_has_the_same_bytes_and_every_other_file_stays(folder, texts, tmp_path):
    common = {**_RUN, "model": str(folder), "calibration": str(texts)}
    whole = apt.run(apt.PruneRun(output=tmp_path / "whole", **common))
    apt.run(apt.PruneRun(output=tmp_path / "streamed", stream=True, **common))
    for name in ("model.safetensors", "1_Pooling/config.json", "modules.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (
            tmp_path / "streamed" / name
        ).read_bytes()
    assert (tmp_path / "whole" / "modules.json").read_text() == "[]"
    assert whole.calibration["shape"][0] == 12
    assert whole.calibration["shape"][1] <= 24  # as sentence-transformers cuts texts
    fill = pipeline("fill-mask", model=str(tmp_path / "whole"))
    assert len(fill("the [MASK] of a city")) == 5


def test_masked_language_model_is_measured_by_its_own_metrics(folder, texts, tmp_path):
    report = apt.run(
        apt.PruneRun(
            model=str(folder), calibration=str(texts), evaluation=str(texts),
            output=tmp_path / "out", **_RUN,
        )
    )  # fmt: skip
    before, after = report.scores["before"], report.scores["after"]
    assert before["predictions"] == 1
    assert 0 <= after["predictions"] <= 1
    assert before["pseudo-perplexity"] > 1


def test_streamed_run_measures_the_same(folder, texts, tmp_path):
    scores = []
    for stream in (False, True):
        run = apt.PruneRun(
            model=str(folder), calibration=str(texts), evaluation=str(texts), stream=stream,
            output=tmp_path / f"out-{stream}", **_RUN,
        )  # fmt: skip
        scores.append(apt.run(run).scores["after"])
    assert scores[0] == pytest.approx(scores[1])


def test_head_of_the_checkpoint_stays(tmp_path, folder, texts):
    """A model without a head is opened without one."""
    base = tmp_path / "base"
    BertModel(BertForMaskedLM.from_pretrained(folder).config).save_pretrained(base)
    AutoTokenizer.from_pretrained(folder).save_pretrained(base)
    run = apt.PruneRun(
        model=str(base), calibration=str(texts), evaluation=str(texts), output=tmp_path / "out",
        **_RUN,
    )  # fmt: skip
    report = apt.run(run)
    assert report.scores["before"]["similarity"] == pytest.approx(1, abs=1e-5)
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["BertModel"]


def test_smaller_encoder_has_fewer_channels(folder, texts, tmp_path):
    run = apt.ShrinkRun(
        model=str(folder), calibration=str(texts), sizes={"channels": 32}, samples=12, seqlen=32,
        output=tmp_path / "out",
    )  # fmt: skip
    apt.run(run)
    assert BertForMaskedLM.from_pretrained(tmp_path / "out").config.intermediate_size == 32


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("prune", "--own-samples", "4"), "own samples has no effect on BertForMaskedLM"),
        (("prune", "--stack", "decodr"), "no stack 'decodr'"),
        (("prune", "--eval", "builtin", "--metric", "perplexity", "--metric", "accuracy"),
         "BertForMaskedLM has no perplexity"),
        (("recover", "--tokens", "auto"), "tokens auto needs a model that predicts the next token"),
        (("recover", "--top", "8"), "recovery distill does not use top"),
        (("recover", "--kind", "layers"), "needs the dense model, and no report names it"),
        (("fit", "--size", "1MB"), "fit needs a model that predicts the next token"),
        (("eval", "--metric", "similarity"), "compares with the dense model"),
    ],
)  # fmt: skip
def test_what_an_encoder_does_not_have_is_one_line(folder, apt, tmp_path, arguments, words):
    command, *options = arguments
    place = ["-o", tmp_path / "out"] if command in ("prune", "recover", "fit") else []
    result = apt(command, folder, *options, *place)
    assert result.code == 2
    assert words in " ".join(result.err.split())
    assert not (tmp_path / "out").exists()


_TRAINING = {"steps": 6, "checks": 2, "batch": 4, "rate": 3e-3, "samples": 40, "seqlen": 32}


@pytest.fixture(scope="module")
def pruned(folder, tmp_path_factory):
    """The pruned random BERT."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    apt.run(apt.PruneRun(model=str(folder), method="wanda", output=out, **_RUN))
    return out


def _zeros(directory):
    model = BertForMaskedLM.from_pretrained(directory)
    sites = {n: p == 0 for n, p in model.bert.encoder.named_parameters() if p.ndim == 2}
    assert all((zeros.unflatten(1, (-1, 4)).sum(-1) == 2).all() for zeros in sites.values())
    return sites


@pytest.mark.parametrize("kind", ["distill", "layers"])
def test_recovered_encoder_keeps_its_zeros_and_files(folder, pruned, texts, tmp_path, kind):
    run = apt.RecoverRun(
        model=str(pruned), dense=str(folder), calibration=str(texts), evaluation=str(texts),
        kind=kind, output=tmp_path / "out", **_TRAINING,
    )  # fmt: skip
    report = apt.run(run)
    before, after = _zeros(pruned), _zeros(tmp_path / "out")
    assert all(before[name].equal(after[name]) for name in before)
    for name in ("1_Pooling/config.json", "modules.json", "sentence_bert_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (pruned / name).read_bytes()
    record = report.recovery
    losses = dict(record["training"]["held_back"])
    assert losses[record["training"]["best"]] < losses[0]
    assert record["dense_loss"] == 0
    assert record["options"]["batch"] == 4
    # Both are compared with the dense model, not with the pruned one.
    assert 0 < record["scores"]["before"]["predictions"] < 1
    assert record["scores"]["after"]["predictions"] != record["scores"]["before"]["predictions"]


def test_resumed_recovery_of_an_encoder_has_the_same_bytes(folder, pruned, texts, tmp_path):
    class KilledError(Exception):
        pass

    def kill(event):
        if isinstance(event, TrainingStep) and event.step == 5:
            raise KilledError

    common = {"model": str(pruned), "dense": str(folder), "calibration": str(texts), **_TRAINING}
    apt.run(apt.RecoverRun(output=tmp_path / "whole", **common))
    with pytest.raises(KilledError):
        apt.run(apt.RecoverRun(output=tmp_path / "out", **common), observe=kill)
    steps = []
    apt.run(
        apt.RecoverRun(output=tmp_path / "out", resume=True, **common),
        observe=lambda event: steps.append(event) if isinstance(event, TrainingStep) else None,
    )
    assert [event.step for event in steps] == [5, 6] or [event.step for event in steps] == [4, 5, 6]
    one, other = ((tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert one.read_bytes() == other.read_bytes()


def test_rest_of_a_given_time_is_spent_on_training_towards_the_dense_model(
    folder, texts, tmp_path, monkeypatch
):
    """The number of steps is fixed."""
    monkeypatch.setattr(recovery, "_steps_in", lambda seconds, *_: (8, 2, 4))
    notices = []
    run = apt.PruneRun(
        model=str(folder), calibration=str(texts), minutes=9, method="wanda", evaluation=str(texts),
        output=tmp_path / "out", **_RUN,
    )  # fmt: skip
    report = apt.run(run, notice=notices.append)
    assert "minutes: 9: 12 samples, then distillation" in notices
    losses = dict(report.recovery["training"]["held_back"])
    assert losses[report.recovery["training"]["best"]] < losses[0]
    assert report.options["seqlen"] == 32  # the greatest length of a text stays
    assert report.recovery["options"]["metrics"] == report.options["metrics"] != ["perplexity"]
    _zeros(tmp_path / "out")


@pytest.mark.parametrize(
    ("minutes", "fits"), [(1000, ("default", 128)), (1e-3, ("fast", 32)), (1e-6, ("fast", 32))]
)
def test_short_time_has_fewer_samples_and_no_shorter_ones(
    folder, texts, monkeypatch, minutes, fits
):
    monkeypatch.setattr(timed_run, "measure_machine", lambda device: Machine(5e10, 1e11, 2e10))
    monkeypatch.setattr(timed_run, "_mean_length", lambda *_: 128)
    skeleton = open_skeleton(find(str(folder), registry()), registry())
    plan = make_plan(skeleton.module, skeleton.adapter, read_pattern("2:4"), Selection(), None)
    method = registry().methods.get("admm")
    job = Pruning(
        skeleton.adapter, plan, admm, recipe_of(apt.PruneOptions(), method), Augmentation()
    )
    run = apt.PruneRun(model=str(folder), calibration=str(texts), pattern="2:4", minutes=minutes)
    found = timed_run.fit_to_time(run, skeleton, job, method, "cpu", print)
    assert (found.effort, found.samples) == fits
    assert found.seqlen == run.seqlen


def test_stack_is_recorded_as_the_sites_that_are_left_out():
    model = stacked_model("t5")
    from apt.engine.prune_task import _other_stacks

    class _Opened:
        adapter = registry().adapter_for("t5").make()
        module = model

    assert _other_stacks(_Opened, ["encoder"]) == ["decoder.block.*"]
