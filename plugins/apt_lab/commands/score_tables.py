"""The tables of ``apt-prune eval``."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from apt.cli.output import table

if TYPE_CHECKING:
    from apt_lab.windows import Score


def score_table(scores: "Mapping[str, Score]") -> Table:
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


def task_table(tasks: Mapping[str, Mapping[str, Any]]) -> Table:
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
