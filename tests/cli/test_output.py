"""The output of commands at each level: results, notices, progress, JSON and the log file."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from apt.adapter import Extra, Site
from apt.cli.output import notice, print_events, say, show, show_error, show_json, show_rows, table
from apt.cli.progress import Progress, PruningProgress
from apt.events import BlockStarted, SitePruned, TrainingStep, Working
from apt.output.report import Report
from apt.output.timeline import Timeline
from apt.patterns import TargetForm
from apt.planning.plan import Plan, PlannedBlock, PlannedExtra, PlannedSite
from apt.solver import NM
from tests.helpers import ROOT, TEXT
from tests.helpers.commands import commands

SMALL = ("--samples", 4, "--seqlen", 64)
MODEL = "MODEL"  # a random one
WANDA = ("prune", MODEL, *SMALL, "--method", "wanda", "--pattern", "2:4", "-o", "out")
RUN = (*WANDA, "--calibration", TEXT)


@pytest.fixture
def apt(apt, checkpoint):
    return lambda *words: apt(*(checkpoint("llama") if w is MODEL else w for w in words))


def test_each_block_is_a_line_without_a_terminal(apt):
    run = apt(*RUN)
    blocks = [line for line in run.err.splitlines() if line.startswith("block ")]
    assert len(blocks) == 3
    for number, line in enumerate(blocks, 1):
        left = r"  [\d.]+ s left" if number < 3 else ""
        assert re.fullmatch(rf"block {number}/3  mean error 0\.\d{{4}}{left}", line), line


def test_defaults_are_printed_after_the_text_is_read(apt):
    run = apt("prune", MODEL, "--samples", 10_000, "--calibration", TEXT)
    assert run.code == 2
    assert len(run.err.splitlines()) == 1
    run = apt("prune", MODEL, *SMALL, "--method", "wanda")
    assert [line.endswith("(default)") for line in run.err.splitlines()] == [True] * 3 + [False] * 3


def test_quiet_prints_results_and_errors_only(apt):
    run = apt("--quiet", *RUN)
    assert run.code == 0
    assert run.err == ""
    assert "zeros in the pruned sites, verified on disk" in run.out
    assert "exists and is not empty" in apt(*RUN, "--quiet").err


def test_verbose_also_prints_steps_and_weights(apt):
    run = apt(*RUN, "--verbose")
    assert "loading the model" in run.err
    assert len(re.findall(r"model\.layers\.\d\.\S+  error", run.err)) == 21
    assert "--quiet and --verbose are both given" in apt(*RUN, "-v", "-q").err


def events(text):
    return [json.loads(line) for line in text.splitlines()]


def test_json_prints_progress_as_events(apt, checkpoint):
    run = (checkpoint("llama"), "--calibration", TEXT, "--samples", 2, "--seqlen", 16, "--json")
    done = apt("prune", *run, "--pattern", "2:4", "--output", "out", "--effort", "fast")
    assert json.loads(done.out)["output"] == "out"
    found = events(done.err)
    kinds = {event["event"] for event in found}
    assert kinds == {"step", "notice", "site", "block"}
    blocks = [event for event in found if event["event"] == "block"]
    assert [(event["block"], event["blocks"]) for event in blocks] == [(n, 3) for n in range(1, 4)]
    assert [event["done"] for event in blocks] == [1 / 3, 2 / 3, 1]
    assert blocks[0]["seconds_left"] > 0
    sites = [event for event in found if event["event"] == "site"]
    assert len(sites) == 21
    assert {"name", "shape", "zeros", "relative_error", "seconds"} <= sites[0].keys()
    quiet = apt("prune", *run, "--pattern", "0.5", "--output", "quiet", "--quiet")
    assert not quiet.err


def test_recovery_and_comparison_print_events(apt, checkpoint):
    text = ("--calibration", TEXT, "--seqlen", 16, "--json")
    rows = apt(
        "compare", checkpoint("llama"), *text, "--methods", "magnitude", "--patterns", "2:4",
        "--samples", 2, "--data", TEXT, "--windows", 2, "--output", "compared",
    )  # fmt: skip
    row_events = [event for event in events(rows.err) if event["event"] == "row"]
    assert [(event["done"], event["rows"]) for event in row_events] == [(1, 2), (2, 2)]
    assert row_events[1]["row"]["scores"][TEXT.name]["perplexity"] > 1
    pruned = (*text, "--samples", 2, "--method", "wanda", "--output", "pruned")
    apt("prune", checkpoint("llama"), *pruned)
    done = apt(
        "recover", "pruned", *text, "--kind", "layers", "--steps", 2, "--checks", 2, "--batch", 2
    )  # fmt: skip
    steps = [event for event in events(done.err) if event["event"] == "training step"]
    assert [event["step"] for event in steps] == [1, 2]
    assert any(event["event"] == "held back" for event in events(done.err))


def test_log_file_has_all_messages(apt):
    apt(*WANDA, "--quiet", "--log-file", "log.txt")
    apt(*WANDA, "--log-file=log.txt")
    lines = Path("log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|ERROR) ", s) for s in lines)
    messages = [line.split(" ", 3)[3] for line in lines]
    assert "calibration: builtin (default)" in messages
    assert sum(line.startswith("block ") for line in messages) == 3
    assert "ERROR out exists and is not empty" in lines[-1]


def test_unwritable_log_file_is_a_one_line_error(apt):
    run = apt(*RUN, "--log-file", "no/such/folder/log.txt")
    assert run.code == 2
    assert "no/such/folder/log.txt cannot be written: its folder does not exist" in run.err


def test_piped_tables_are_not_wrapped_or_shortened(apt, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    rows = apt("methods").out.splitlines()
    for record in json.loads(apt("methods", "--json").out):
        assert sum(all(value in row for value in record.values()) for row in rows) == 1
    assert not any("…" in row for row in apt("adapters").out.splitlines())


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (("adapters",), {"adapter", "model types", "embedded", "from", "summary"}),
        (("methods",), {"method", "source", "from", "summary"}),
        (("plugins",), {"distribution", "entry point", "offers", "state"}),
        (("inspect", MODEL, *SMALL), {"model", "sites", "blocks", "needs", "adapter"}),
        ((*RUN, "--dry-run"), {"model", "sites", "blocks", "needs", "adapter"}),
        (RUN, {"output", "sparsity", "relative_layer_error", "kinds", "seconds", "scores"}),
        (("convert", MODEL, "-o", "new"), {"output", "class", "tokenizer"}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_each_command_prints_json(apt, words, keys):
    run = apt(*words, "--json")
    assert run.code == 0, run.err
    found = json.loads(run.out)
    assert keys <= (found[0] if isinstance(found, list) else found).keys()


def test_verify_prints_json(apt):
    apt(*RUN)
    found = json.loads(apt("verify", "out", "--json").out)
    assert (found["sites"], found["failed"], found["zeros"] * 2) == (21, [], found["weights"])
    run = apt("verify", "out", "--pattern", "1:4", "--json")
    assert run.code == 1
    failed = json.loads(run.out)["failed"]
    assert failed[0]["name"] == "model.layers.0.self_attn.q_proj"
    assert "keeps 2 of inputs 0 to 3" in failed[0]["detail"]


def test_nan_and_infinity_are_strings_in_json(capsys):
    show_json({"a": [float("nan"), float("inf"), -float("inf"), 1.5], "b": (1, None)})
    record = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert record == {"a": ["NaN", "Infinity", "-Infinity", 1.5], "b": [1, None]}


def test_infinite_score_survives_a_round_trip_of_the_report():
    scores = {"source": "x", "shape": [2, 8], "after": {"perplexity": float("inf")}}
    report = Report(options={}, model={}, calibration={}, scores=scores)
    assert Report.from_dict(report.to_dict()).scores == scores


def test_help_of_each_option_is_a_sentence():
    for name, command in commands().items():
        for parameter in command.params:
            text = getattr(parameter, "help", None)
            assert text, f"{name} {parameter.name}"
            assert text.endswith(".") or ":" in text, f"{name} {parameter.name}: {text}"


@pytest.mark.parametrize("command", ["prune", "bench"])
def test_each_option_of_a_run_is_in_the_documentation(command):
    page = (ROOT / "docs/usage.md").read_text()
    for parameter in commands()[command].params:
        if getattr(parameter, "hidden", False):
            continue
        for option in (*parameter.opts, *parameter.secondary_opts):
            if option.startswith("--") and option != "--help":
                assert f"`{option}" in page, option
    for option in ("--quiet", "--verbose", "--log-file", "--debug", "--install-completion"):
        assert f"`{option}" in page, option


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion_does_not_import_torch(shell, tmp_path):
    code = (
        "import sys, os, apt.cli\nsys.argv = ['/usr/bin/apt-prune']\n"
        "try: apt.cli.main()\nfinally: assert 'torch' not in sys.modules\n"
    )
    environment = {
        "_APT_PRUNE_COMPLETE": f"complete_{shell}", "COMP_WORDS": "apt-prune prune --samp",
        "COMP_CWORD": "2", "_TYPER_COMPLETE_ARGS": "apt-prune prune --samp",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args", "PATH": "/usr/bin",
        "PYTHONPATH": ":".join(sys.path),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert "--samples" in done.stdout, done.stderr


def test_restored_blocks_do_not_count_for_the_time_left(monkeypatch):
    """Two of four blocks are restored within a second, and the third takes 100 seconds."""
    seconds = [0]
    monkeypatch.setattr("apt.cli.progress.time.perf_counter", lambda: seconds[0])
    site = PlannedSite("q", Site("q", "q.weight", "x"), (4, 8), TargetForm(NM(2, 4)))
    extra = PlannedExtra("conv1d", Extra("conv1d", "conv1d", "conv1d.weight"), (8, 4), NM(2, 4))
    progress = PruningProgress(Plan((PlannedBlock("block", (site,), (extra,)),) * 4), [])
    pruned = [
        SitePruned(entry.name, entry.name, entry.shape, "2:4", 16, 0.1, None, None, 9, 0.1)
        for entry in (extra, site)
    ]
    solved = [Working("block", "running"), pruned[0], Working("block", "solving"), pruned[1]]
    left = []
    for index, events in enumerate([pruned, pruned, solved, solved]):
        for event in (BlockStarted("block", index, 4), *events):
            progress.observe(event)
            seconds[0] += 100 / 5 if events is solved else 0.1
        left.append(progress.seconds_left)
    assert left == [None, None, pytest.approx(100), None]


def test_timeline_begins_the_pruning_with_its_first_block():
    timeline = Timeline(lambda text: None, lambda event: None)
    timeline.status("opening the model", "loading the model")
    for index in (1, 2):
        timeline.observe(BlockStarted("block", index, 4))
    assert [phase for phase, _ in timeline.record()["phases"]] == ["opening the model", "pruning"]


def test_several_steps_of_a_phase_are_one_entry_of_the_timeline():
    shown = []
    timeline = Timeline(shown.append, shown.append)
    step = TrainingStep(1, 2, 3.0, 1e-3, 0.1)
    timeline.status("reading text")
    for sample in range(3):
        timeline.status("dense model", f"sample {sample}")
    timeline.observe(step)
    timeline.observe(step)
    record = timeline.record()
    assert shown == ["reading text", "sample 0", "sample 1", "sample 2", step, step]
    assert [phase for phase, _ in record["phases"]] == ["reading text", "dense model", "training"]
    assert len(record["memory"]) == 4  # of each phase, and of the end


HOSTILE = "\x1b[2Jmodel\x07\r\nverified \u202eon\x9b1A [bold]disk[/bold]"
SHOWN = r"\x1b[2Jmodel\x07\r\nverified \u202eon\x9b1A [bold]disk[/bold]"


def hostile_table():
    made = table(HOSTILE, title=HOSTILE)
    made.add_row(HOSTILE)
    show(made)


@pytest.mark.parametrize(
    "printed",
    [
        lambda: say(HOSTILE),
        lambda: notice(HOSTILE),
        lambda: show_error(HOSTILE),
        lambda: show_rows([{HOSTILE: HOSTILE}], as_json=False),
        hostile_table,
    ],
    ids=["result", "notice", "error", "rows", "table"],
)
def test_control_characters_and_markup_in_names_are_printed_as_text(printed, capsys):
    print_events(False)
    printed()
    found = "".join(capsys.readouterr())
    assert SHOWN in found
    assert not set(found) & set("\x1b\x07\r\x9b\u202e")
    assert all("verified" not in line or "model" in line for line in found.splitlines())


def test_live_display_escapes_control_characters(monkeypatch):
    progress = Progress()
    progress.show(HOSTILE)
    assert progress._display.tasks[0].description == SHOWN


def test_control_characters_in_a_report_are_escaped(apt, tmp_path):
    assert apt(*RUN, "--log-file", "log.txt").code == 0
    place = Path("out/apt_report.json")
    report = json.loads(place.read_text())
    report["sites"][0]["name"] = HOSTILE
    report["files"][HOSTILE] = report["files"].pop("config.json")
    place.write_text(json.dumps(report))
    run = apt("verify", "out", "--log-file", "log.txt")
    assert run.code != 0
    for text in (run.out, run.err, Path("log.txt").read_text()):
        assert not set(text) & set("\x1b\x07\r\x9b\u202e")
    assert SHOWN in run.out + run.err


def test_control_characters_in_a_checkpoint_are_escaped(apt, checkpoint):
    shutil.copytree(checkpoint("llama"), "model")
    place = Path("model/config.json")
    place.write_text(json.dumps(json.loads(place.read_text()) | {"model_type": HOSTILE}))
    run = apt("prune", "model", *SMALL, "--pattern", "2:4", "-o", "out")
    assert run.code == 2
    assert not set(run.err) & set("\x1b\x07\r\x9b\u202e")
    assert r"\x1b[2Jmodel" in run.err
