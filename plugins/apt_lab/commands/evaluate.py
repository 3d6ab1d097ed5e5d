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
        result = measure(run, progress.status, notice, progress=has_live_display())
    if printing.as_json:
        show_json(result.record())
    else:
        _show(result)
    if result.not_finite:
        model, data = run.model, result.run.data
        show_error(
            f"{model} has no {result.not_finite} on {data}: its outputs there are not finite"
        )
        raise typer.Exit(1)


def _show(result: Evaluation) -> None:
    if result.tokens is not None:
        windows, seqlen = result.tokens.shape
        figures = ", ".join(f"{name} {score.value:.3f}" for name, score in result.scores.items())
        first_token = f", each with {result.bos[1]} first" if result.bos else ""
        size = f"{windows} × {seqlen} tokens" if result.of_windows else f"{windows} samples"
        measured = f"{result.run.data}, {size}{first_token}"
        say(f"{result.run.model}: {figures} on {measured}")
        if any(
            score.dense is not None or score.spread is not None for score in result.scores.values()
        ):
            show(_score_table(result.scores))
    if result.tasks:
        show(_task_table(result.tasks))


def _score_table(scores: "Mapping[str, Score]") -> "Table":
    """A row for each metric on text, beside the dense model.

    Args:
        scores: the metrics by name.
    """
    rows = table("metric", ">value", ">± error", "95 % interval", ">dense")
    for name, score in scores.items():
        error, interval = "", ""
        if score.spread is not None:
            error = _figure(score.spread.error)
            interval = f"{score.spread.low:.3f} … {score.spread.high:.3f}"
        rows.add_row(name, _figure(score.value), error, interval, _figure(score.dense))
    return rows


def _task_table(tasks: Mapping[str, Mapping[str, Any]]) -> "Table":
    """A row for each metric of each task, with the differences from the dense model if known.

    Args:
        tasks: the summaries of `apt_lab.tasks.answers.summary` by the name of the task.
    """
    dense = any("changed" in task for task in tasks.values())
    dense_columns = [">dense", ">difference", "95 % interval", ">other answers"] if dense else []
    rows = table("task", "metric", ">value", ">± error", *dense_columns, ">questions")
    for name, task in tasks.items():
        for metric, values in task["metrics"].items():
            dense_cells = _beside(task, values) if dense else []
            rows.add_row(
                name, metric, _figure(values["value"]), _figure(values["stderr"]), *dense_cells,
                str(task["questions"]),
            )  # fmt: skip
    return rows


def _beside(task: Mapping[str, Any], values: Mapping[str, float]) -> list[str]:
    """The cells about the dense model."""
    interval = ""
    if "low" in values:
        interval = f"{values['low']:+.3f} … {values['high']:+.3f}"
    share = task.get("changed")
    return [
        _figure(values.get("dense")),
        f"{values['difference']:+.3f}" if "difference" in values else "",
        interval,
        "" if share is None else f"{share:.1%}",
    ]


def _figure(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.3f}"
