"""The table of a comparison as Markdown and CSV.

A row has the metrics of each text and one metric of each task, with their standard errors. CSV has
the 95 % intervals of the metrics of text, and all metrics of the tasks with their differences from
the dense model.
"""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from apt_lab.comparing.results import Row
from apt_lab.tasks.answers import Answers, summary
from apt_lab.windows import spread

ERRORS = (
    "±: the standard error. For metrics of text it is that of the difference from the dense model, "
    "over the windows; for tasks it is that of the value, over the questions."
)
_PARTS = ("value", "stderr", "difference", "low", "high")


def columns(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The texts and metrics of the rows."""
    return [(text, metric) for text, scores in rows[0]["scores"].items() for metric in scores]


def header(rows: Sequence[Row]) -> list[str]:
    """The names of the columns."""
    scores = [f"{metric} on {text}" for text, metric in columns(rows)]
    tasks = [f"{task.task} {task.main}".rstrip() for task in answers(rows[0])]
    return ["method", "pattern", "zeros", *scores, *tasks, "layer error", "seconds"]


def answers(row: Row) -> list[Answers]:
    """The answers of a row."""
    return [Answers.read(record) for record in row.get("tasks", {}).values()]


def summaries(row: Row, dense: Row) -> dict[str, Any]:
    """The figures of each task of a row, with the differences from the dense model."""
    dense_answers = {task.task: task for task in answers(dense)}
    return {task.task: summary(task, dense_answers.get(task.task)) for task in answers(row)}


def intervals(row: Row, dense: Row) -> dict[str, dict[str, tuple[float, float]]]:
    """The 95 % interval of each metric of a row by text, where it is known."""
    return {
        text: {
            metric: (interval.low, interval.high)
            for metric in scores
            if (interval := spread(row, dense, text, metric)) is not None
        }
        for text, scores in row["scores"].items()
    }


def texts_of(row: Row, dense: Row) -> list[str]:
    """The texts of a row of the table, relative to the dense model's row."""
    zeros = row.get("sparsity")
    return [
        str(row["method"]),
        str(row["pattern"]),
        "" if zeros is None else f"{float(zeros):.2%}",
        *(_measure(row, dense, *column) for column in columns([dense])),
        *map(_accuracy, answers(row)),
        _figure(row.get("error")),
        "" if row.get("seconds") is None else f"{float(row['seconds']):.0f}",
    ]


def _measure(row: Row, dense: Row, text: str, metric: str) -> str:
    """A metric of a row with its standard error; the dense model has none."""
    value = _figure(row["scores"].get(text, {}).get(metric))
    interval = None if row is dense else spread(row, dense, text, metric)
    return value if interval is None else f"{value} ± {interval.error:.2g}"


def _figure(value: Any) -> str:
    return "" if value is None else f"{float(value):.4g}"


def _accuracy(task: Answers) -> str:
    """The main metric of a task with its standard error; NaN stands for an unknown error."""
    if not task.metrics:
        return ""
    value, error = task.metrics[task.main]
    return f"{value:.3f}" if math.isnan(error) else f"{value:.3f} ± {error:.3f}"


def markdown(rows: Sequence[Row]) -> str:
    """The table as Markdown."""
    names = header(rows)
    lines = [names, ["---"] * len(names), *(texts_of(row, rows[0]) for row in rows)]
    table = "\n".join(f"| {' | '.join(_escaped(text) for text in line)} |" for line in lines)
    return f"{table}\n\n{ERRORS}\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def as_csv(rows: Sequence[Row]) -> str:
    """The table as CSV, with all digits."""
    names, file = columns(rows), io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    task_metrics = [(t.task, metric) for t in answers(rows[0]) for metric in t.metrics]
    writer.writerow([
        "method", "pattern", "zeros",
        *(f"{metric} on {text}{end}" for text, metric in names for end in ("", " low", " high")),
        *(f"{task} {metric} {part}" for task, metric in task_metrics for part in _PARTS),
        *(f"{t.task} other answers" for t in answers(rows[0])), "layer error", "seconds",
    ])  # fmt: skip
    for row in rows:
        known_intervals = intervals(row, rows[0])
        scores = [
            figure
            for text, metric in names
            for figure in (
                row["scores"].get(text, {}).get(metric, ""),
                *known_intervals.get(text, {}).get(metric, ("", "")),
            )
        ]
        task_summaries = summaries(row, rows[0])
        tasks = [
            task_summaries[task]["metrics"][metric].get(part, "")
            for task, metric in task_metrics
            for part in _PARTS
        ]
        changed = [task["changed"] for task in task_summaries.values()]
        run_figures = [row.get(name, "") for name in ("error", "seconds")]
        start = [row["method"], row["pattern"], row.get("sparsity", "")]
        writer.writerow([*start, *scores, *tasks, *changed, *run_figures])
    return file.getvalue()
