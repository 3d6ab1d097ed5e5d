"""``apt-prune eval``."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from apt.console import Progress, has_live_display, notice, say, show, show_error, show_json, table
from apt.options import PrintingOptions
from apt_lab.evaluating import Evaluation
from apt_lab.evaluating import evaluate as measure
from apt_lab.options import EvalRun

if TYPE_CHECKING:
    from rich.table import Table

    from apt_lab.windows import Score


def evaluate(run: EvalRun, printing: PrintingOptions) -> None:
    """Measure a model over consecutive windows of text, or let it answer tasks.

    With --tasks, text is measured only if --metric or --data is given. The exit status is 1 if a
    measure is not a finite number.
    """
    with Progress() as progress:
        found = measure(run, progress.status, notice, progress=has_live_display())
    if printing.as_json:
        show_json(found.record())
    else:
        _show(found)
    if found.not_finite:
        model, data = run.model, found.run.data
        show_error(f"{model} has no {found.not_finite} on {data}: its outputs there are not finite")
        raise typer.Exit(1)


def _show(found: Evaluation) -> None:
    if found.tokens is not None:
        windows, seqlen = found.tokens.shape
        figures = ", ".join(f"{name} {one.value:.3f}" for name, one in found.scores.items())
        begin = f", each with {found.bos[1]} first" if found.bos else ""
        measured = f"{found.run.data}, {windows} × {seqlen} tokens{begin}"
        say(f"{found.run.model}: {figures} on {measured}")
        if any(one.dense is not None or one.spread is not None for one in found.scores.values()):
            show(_score_table(found.scores))
    if found.tasks:
        show(_task_table(found.tasks))


def _score_table(scores: "Mapping[str, Score]") -> "Table":
    """A row for each metric on text, beside the dense model.

    Args:
        scores: the metrics by name.
    """
    made = table("metric", ">value", ">± error", "95 % interval", ">dense")
    for name, score in scores.items():
        error, interval = "", ""
        if score.spread is not None:
            error = _figure(score.spread.error)
            interval = f"{score.spread.low:.3f} … {score.spread.high:.3f}"
        made.add_row(name, _figure(score.value), error, interval, _figure(score.dense))
    return made


def _task_table(tasks: Mapping[str, Mapping[str, Any]]) -> "Table":
    """A row for each metric of each task, with the differences from the dense model if known.

    Args:
        tasks: the summaries of `apt_lab.tasks.answers.summary` by the name of the task.
    """
    dense = any("changed" in task for task in tasks.values())
    beside = [">dense", ">difference", "95 % interval", ">other answers"] if dense else []
    made = table("task", "metric", ">value", ">± error", *beside, ">questions")
    for name, task in tasks.items():
        for metric, found in task["metrics"].items():
            more = _beside(task, found) if dense else []
            made.add_row(
                name, metric, _figure(found["value"]), _figure(found["stderr"]), *more,
                str(task["questions"]),
            )  # fmt: skip
    return made


def _beside(task: Mapping[str, Any], found: Mapping[str, float]) -> list[str]:
    """The cells about the dense model."""
    interval = ""
    if "low" in found:
        interval = f"{found['low']:+.3f} … {found['high']:+.3f}"
    share = task.get("changed")
    return [
        _figure(found.get("dense")),
        f"{found['difference']:+.3f}" if "difference" in found else "",
        interval,
        "" if share is None else f"{share:.1%}",
    ]


def _figure(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.3f}"
