"""Streamed runs of encoders, encoder-decoders and towers write the bytes of runs in memory."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

import apt
from apt.engine.text import Text
from tests.helpers.interrupted import PLACES, KilledError, cut
from tests.helpers.stacked import MODELS, samples_of, stacked_model


def pruned(model, output, **options):
    """Prune a directory to 2:4 by a fast method; the bytes of its weights."""
    run = apt.PruneRun(
        model=str(model), output=Path(output), pattern="2:4", method="ss", samples=8,
        **{"calibration": "given"} | options,
    )  # fmt: skip
    apt.run(run)
    return (Path(output) / "model.safetensors").read_bytes()


@pytest.fixture
def given_samples(monkeypatch):
    """A function that lets runs read random samples for a model, without a source."""

    def give(name, without=None):
        samples = samples_of(name, 8)
        kept = [{key: each for key, each in one.items() if key != without} for one in samples]
        text = Text(None, samples.with_samples(kept))
        monkeypatch.setattr("apt.engine.prune_task.read_samples", lambda *args, **options: text)

    return give


@pytest.mark.parametrize("name", MODELS)
def test_streamed_run_writes_the_same_bytes(name, tmp_path, given_samples):
    given_samples(name)
    stacked_model(name).save_pretrained(tmp_path / "model")
    whole = pruned(tmp_path / "model", tmp_path / "whole")
    assert whole != (tmp_path / "model/model.safetensors").read_bytes()
    assert pruned(tmp_path / "model", tmp_path / "streamed", stream=True) == whole


def test_resumed_run_uses_the_generated_targets_again(tmp_path, given_samples, monkeypatch):
    """The dense model writes the texts of the decoder once."""
    given_samples("t5", without="decoder_input_ids")
    stacked_model("t5").save_pretrained(tmp_path / "model")
    whole = pruned(tmp_path / "model", tmp_path / "whole")
    with monkeypatch.context() as patch:
        cut(patch, PLACES["journal"], 6, KilledError())
        with pytest.raises(KilledError):
            pruned(tmp_path / "model", tmp_path / "out", stream=True)
    monkeypatch.setattr("apt.engine.prune_model.greedy_outputs", lambda *given: 1 / 0)
    assert pruned(tmp_path / "model", tmp_path / "out", stream=True, resume=True) == whole


def test_auto_prunes_one_stack_streamed_and_resumed(tmp_path, given_samples, monkeypatch):
    given_samples("t5")
    stacked_model("t5").save_pretrained(tmp_path / "model")
    options = {"adapter": "auto", "stacks": ("decoder",)}
    whole = pruned(tmp_path / "model", tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        cut(patch, PLACES["journal"], 4, KilledError())
        with pytest.raises(KilledError):
            pruned(tmp_path / "model", tmp_path / "out", stream=True, **options)
    found = pruned(tmp_path / "model", tmp_path / "out", stream=True, resume=True, **options)
    assert found == whole
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("model", "out"))
    changed = {name for name in before if not before[name].equal(after[name])}
    assert {name.split(".")[0] for name in changed} == {"decoder"}
    assert len(changed) == 2 * 10  # of two attentions and the MLP
