"""`apt.run` does the same as a command, with the same checks and the same bytes."""

import os
import signal
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

import apt as library
from apt.engine.opening import resolve_names
from apt.engine.run import Watcher, drive
from apt.events import BlockStarted, SitePruned
from apt.plugin.registry import registry
from apt.plugin.specs import EvaluatorSpec
from tests.helpers import TEXT
from tests.helpers.families import random_model, random_tokens
from tests.helpers.processes import forked


def files(directory):
    """The hashes of the files of a directory, without the report, which contains times."""
    paths = (path for path in Path(directory).rglob("*") if path.name != "apt_report.json")
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in paths}


def options(model, output, **more):
    return library.PruneRun(
        model=str(model), output=Path(output), pattern="2:4", samples=4, seqlen=32,
        calibration=str(TEXT), **more,
    )  # fmt: skip


@pytest.mark.parametrize("stream", [False, True], ids=["memory", "streamed"])
def test_program_and_command_write_the_same_files(checkpoint, apt, stream):
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
    """Run in this process, which is killed in the third block."""

    def observe(event):
        if isinstance(event, BlockStarted) and event.index == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    os.chdir(folder)
    library.run(options(model, "out", stream=True), observe=observe)


def test_killed_program_is_resumed_with_the_same_files(checkpoint, tmp_path, monkeypatch):
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


def test_run_trains_and_reapplies(checkpoint, tmp_path, monkeypatch):
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


def test_failed_measurement_keeps_the_trained_model(checkpoint, tmp_path, monkeypatch):
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


def test_programs_get_the_errors_of_the_shell():
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


class Recorder(Watcher):
    """Records the names of the methods that are called."""

    def __init__(self):
        self.seen = []
        super().__init__(status=lambda text: self.seen.append("status"))

    def __getattribute__(self, name):
        if name in ("resolved", "planned", "complete", "written", "packed", "exported"):
            return lambda *given: self.seen.append(name)
        return super().__getattribute__(name)

    def during(self, work, task):
        self.seen.append(work)
        return super().during(work, task)


@pytest.mark.parametrize(
    ("dry_run", "seen"),
    [
        (True, ["resolved", "checking", "planned"]),
        (False, ["resolved", "running", "status", "written", "packing", "packed"]),
    ],
    ids=["dry run", "run"],
)
def test_watcher_sees_the_steps_in_order(checkpoint, tmp_path, monkeypatch, dry_run, seen):
    monkeypatch.chdir(tmp_path)
    watcher = Recorder()
    wanted = options(checkpoint("llama"), "out", pack=Path("packed"))
    named = resolve_names(wanted, registry(), watcher.notice)
    report = drive(named, watcher, library.Ranks(), dry_run=dry_run)
    assert list(dict.fromkeys(watcher.seen)) == seen
    assert (report is None) is dry_run
    assert Path("packed").exists() is Path("out").exists() is not dry_run


class Refusing(Watcher):
    """Raises an exception before the work."""

    def resolved(self, task):
        raise library.AptError("no")


def test_exception_of_a_watcher_stops_the_run_before_writing(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    watcher = Refusing()
    named = resolve_names(options(checkpoint("llama"), "out"), registry(), watcher.notice)
    with pytest.raises(library.AptError, match="no"):
        drive(named, watcher, library.Ranks())
    assert list(Path().iterdir()) == []
