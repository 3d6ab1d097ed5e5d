"""Damaged reports: each reader gives a one-line error, or does not need the damaged entry."""

import copy
import json
import os
import random
import shutil
from pathlib import Path

import pytest

import apt as library
from apt.output.schema import first_problem
from tests.helpers import TEXT

DAMAGED = int(os.environ.get("APT_DAMAGED_REPORTS", "60"))
SMALL = ("--samples", 2, "--seqlen", 16, "--calibration", TEXT)
GONE = "(missing)"
WRONG = [
    None, 0, -1, 1e308, 10**400, float("nan"), float("inf"), "x", "", [], {}, True, [None],
    {"a": None}, 2**70, [[1]], "NaN", GONE,
]  # fmt: skip


@pytest.fixture(scope="module")
def results(output_of, checkpoint):
    """The outputs of a pruning, of its recovery, and of a smaller model."""
    pruned = output_of(
        "prune", checkpoint("llama"), *SMALL, "--sparsity", 0.5, "--effort", "fast", "--eval", TEXT
    )
    few = ("--kind", "layers", "--steps", 2, "--batch", 2, "--seqlen", 16, "--calibration", TEXT)
    smaller = output_of("shrink", checkpoint("qwen2-moe"), *SMALL, "--size", "experts=2")
    return [pruned, output_of("recover", pruned, *few), smaller]


def places(value, path=()):
    """The paths of all entries of a record; of a list, only its first item."""
    yield path
    if isinstance(value, dict):
        for name, item in value.items():
            yield from places(item, (*path, name))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def damaged(record, path, value):
    """A copy of a record with another value at one path."""
    if not path:
        return [] if value is GONE else value
    record = copy.deepcopy(record)
    place = record
    for step in path[:-1]:
        place = place[step]
    if value is GONE:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return record


COMMANDS = {
    "report": ("report", "m", "-o", "page.html", "--overwrite"),
    "verify": ("verify", "m"),
    "law": ("law", "m"),
    "reapply": ("reapply", "m", "m", "-o", "out", "--overwrite"),
    "recover": ("recover", "m", "--dense", "nowhere", "-o", "out"),
    "overwritten": ("convert", "zoo:llama", "-o", "m", "--overwrite"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_damaged_report_is_a_one_line_error_or_harmless(apt, results, command):
    draw, found = random.Random(command), []
    for _ in range(DAMAGED // len(COMMANDS)):
        shutil.rmtree("m", ignore_errors=True)
        shutil.copytree(draw.choice(results), "m")
        report = Path("m/apt_report.json")
        record = json.loads(report.read_text())
        place, value = draw.choice(list(places(record))), draw.choice(WRONG)
        report.write_text(json.dumps(damaged(record, place, value)))
        run = apt(*COMMANDS[command])
        assert run.code in (0, 1, 2), (place, value)
        assert run.code != 2 or run.err.splitlines()[-1].startswith("apt: "), (place, value)
        found.append(run.code)
    print(f"{command}: {len(found)} reports, {found.count(2)} refused")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema",), 99, "has schema 99, not 1; use the version of APT that wrote it"),
        (("schema",), GONE, "is damaged: schema is missing"),
        (("files",), GONE, "is damaged: files is missing; restore it, or delete it"),
        (("files",), {"a": 5}, "is damaged: files.a is no text"),
        (("sites", 0, "zeros"), float("inf"), "is damaged: Infinity is no number in JSON"),
        (("sites", 0, "zeros"), "0", "is damaged: sites[0].zeros is no count"),
        (("sites", 0, "shape"), [0, 4], "is damaged: sites[0].shape[0] is 0"),
        (("seconds",), 1e308, "is damaged: seconds is no amount"),
        (("skipped",), None, "is damaged: skipped is no list"),
        ((), [], "is damaged: it is not a report"),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["verify", "report"])
def test_problem_of_a_report_names_its_place(apt, results, command, path, value, message):
    shutil.copytree(results[0], "m")
    report = Path("m/apt_report.json")
    report.write_text(json.dumps(damaged(json.loads(report.read_text()), path, value)))
    run = apt(*COMMANDS[command])
    assert run.code == 2
    assert message in run.err
    with pytest.raises(library.AptError):
        library.Report.read(Path("m"))


def test_written_reports_have_no_problem(results, checkpoint, output_of):
    searched = output_of("shrink", checkpoint("llama"), *SMALL, "--search", "--evaluations", 2)
    for result in (*results, searched, output_of("reapply", results[0], checkpoint("llama"))):
        assert first_problem(json.loads((result / "apt_report.json").read_text())) == ""


def test_number_that_is_not_finite_survives_a_round_trip(results):
    found = json.loads((results[0] / "apt_report.json").read_text())
    found["scores"]["after"]["perplexity"] = "Infinity"
    assert library.Report.from_dict(found).scores["after"]["perplexity"] == float("inf")
