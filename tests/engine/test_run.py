"""`apt.run`: what a command does, from a program, with the same checks and the same bytes."""

import os
import signal
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

import apt as library
from apt.events import BlockStarted, SitePruned
from apt.plugin.specs import EvaluatorSpec
from tests.helpers import TEXT
from tests.helpers.families import random_model, random_tokens
from tests.helpers.processes import forked


def files(directory):
    """The hashes of the files of a directory, without the report, which has times."""
    paths = (path for path in Path(directory).rglob("*") if path.name != "apt_report.json")
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in paths}


def options(model, output, **more):
    return library.PruneRun(
        model=str(model), output=Path(output), pattern="2:4", samples=4, seqlen=32,
        calibration=str(TEXT), **more,
    )  # fmt: skip


@pytest.mark.parametrize("stream", [False, True], ids=["memory", "streamed"])
def test_a_program_writes_what_the_command_writes(checkpoint, apt, stream):
    words = ("--samples", 4, "--seqlen", 32, "--calibration", TEXT, "--pattern", "2:4")
    run = apt("prune", checkpoint("llama"), *words, *["--stream"] * stream, "-o", "shell")
    assert run.code == 0, run.err
    events, steps, lines = [], [], []
    report = library.run(
        options(checkpoint("llama"), "program", stream=stream),
        observe=events.append, status=steps.append, notice=lines.append,
    )  # fmt: skip
    assert files("program") == files("shell")
    assert report.to_dict() == library.Report.read(Path("program")).to_dict()
    assert report.sites == [event for event in events if isinstance(event, SitePruned)]
    assert steps[0] == "reading text"
    assert any(line.startswith("method: ") for line in lines)


def killed_in_the_third_block(folder, model):
    """A run in a process that is killed."""

    def observe(event):
        if isinstance(event, BlockStarted) and event.index == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    os.chdir(folder)
    library.run(options(model, "out", stream=True), observe=observe)


def test_a_killed_program_is_resumed(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = checkpoint("llama")
    program = forked.Process(target=killed_in_the_third_block, args=(tmp_path, model))
    program.start()
    program.join()
    assert program.exitcode == -signal.SIGKILL
    assert not Path("out").exists()
    started = []
    again = options(model, "out", stream=True, resume=True)
    report = library.run(again, observe=lambda event: started.append(event))
    library.run(options(model, "whole", stream=True))
    assert files("out") == files("whole")
    assert library.run(again).to_dict() == report.to_dict()  # it is complete
    with pytest.raises(library.AptError, match="result of another run: seed differ"):
        library.run(replace(again, seed=7))


def test_a_training_and_a_reapplication_are_runs_too(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    library.run(options(checkpoint("llama"), "pruned", method="wanda"))
    trained = library.run(
        library.RecoverRun(
            model="pruned", output=Path("trained"), kind="layers", steps=4, batch=2, rate=1e-2,
            seqlen=32, calibration=str(TEXT),
        )
    )  # fmt: skip
    assert trained.recovery["training"]["steps"] == 4
    again = library.ReapplyRun(masks=Path("pruned"), model="trained", output=Path("again"))
    assert library.run(again).reapplied["weights"] == 0  # the training has kept all zeros


def test_a_trained_model_is_not_lost_by_a_measurement_that_fails(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    library.run(options(checkpoint("llama"), "pruned", method="wanda"))
    measure, calls = EvaluatorSpec.measure, []

    def once(self, *given):
        calls.append(given)
        return measure(self, *given) if len(calls) == 1 else 1 / 0

    monkeypatch.setattr(EvaluatorSpec, "measure", once)
    run = library.RecoverRun(
        model="pruned", output=Path("trained"), kind="layers", steps=4, batch=2, rate=1e-2,
        seqlen=32, calibration=str(TEXT), evaluation=str(TEXT),
    )  # fmt: skip
    with pytest.raises(library.AptError, match="written and verified, but measuring it failed"):
        library.run(run)
    report = library.Report.read(Path("trained"))
    assert report.problems == ["measuring it failed: ZeroDivisionError: division by zero"]
    assert set(report.recovery["scores"]) == {"source", "shape", "before"}


def test_a_program_meets_the_checks_of_the_shell():
    model, tokens = random_model("llama"), random_tokens()
    for given, message in (
        ({"method": "wanda", "options": library.PruneOptions(effort="best")}, "effort"),
        ({"method": "wanda", "options": library.PruneOptions(block_size=64)}, "block size"),
        ({"allocation": "owl"}, "allocation owl cannot be used"),
    ):
        with pytest.raises(library.AptError, match=message):
            library.prune(model, tokens, pattern="2:4", **given)
    with pytest.raises(library.AptError, match="recovery layers does not use rank"):
        library.recover(model, tokens, kind="layers", options=library.RecoverOptions(rank=4))
    with pytest.raises(library.AptError, match="the model has 2048 embeddings"):
        library.recover(model, tokens + 1000, kind="layers")
