"""Runs on encoders of text: from a directory to a directory, in memory and streamed."""

import json

import pytest
import torch
from transformers import AutoTokenizer, BertForMaskedLM, BertModel, pipeline

import apt
from apt.locations.model_source import find
from apt.plugin.registry import registry
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
    BertForMaskedLM(config).save_pretrained(path)
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
        (("prune", "--minutes", "5"), "minutes needs a model that predicts the next token"),
        (("prune", "--stack", "decodr"), "no stack 'decodr'"),
        (("prune", "--eval", "builtin", "--metric", "perplexity", "--metric", "accuracy"),
         "BertForMaskedLM has no perplexity"),
        (("recover",), "recover needs a model that predicts the next token"),
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


def test_stack_is_recorded_as_the_sites_that_are_left_out():
    model = stacked_model("t5")
    from apt.engine.prune_task import _other_stacks

    class _Opened:
        adapter = registry().adapter_for("t5").make()
        module = model

    assert _other_stacks(_Opened, ["encoder"]) == ["decoder.block.*"]
