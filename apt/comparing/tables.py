"""The table of a comparison as Markdown and CSV."""

import csv
import io
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def columns(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The texts and metrics of the rows."""
    return [(text, metric) for text, scores in rows[0]["scores"].items() for metric in scores]


def header(rows: Sequence[Row]) -> list[str]:
    """The names of the columns."""
    scores = [f"{metric} on {text}" for text, metric in columns(rows)]
    return ["method", "pattern", "zeros", *scores, "layer error", "seconds"]


def cells(row: Row, names: Sequence[tuple[str, str]]) -> list[str]:
    """The texts of a row."""
    scores = [_figure(row["scores"].get(text, {}).get(metric)) for text, metric in names]
    zeros = row.get("sparsity")
    return [
        str(row["method"]),
        str(row["pattern"]),
        "" if zeros is None else f"{float(zeros):.2%}",
        *scores,
        _figure(row.get("error")),
        "" if row.get("seconds") is None else f"{float(row['seconds']):.0f}",
    ]


def _figure(value: Any) -> str:
    return "" if value is None else f"{float(value):.4g}"


def markdown(rows: Sequence[Row]) -> str:
    """The table as Markdown."""
    names, top = columns(rows), header(rows)
    lines = [top, ["---"] * len(top), *(cells(row, names) for row in rows)]
    return "\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def as_csv(rows: Sequence[Row]) -> str:
    """The table as CSV, with all digits."""
    names, file = columns(rows), io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header(rows))
    for row in rows:
        scores = [row["scores"].get(text, {}).get(metric, "") for text, metric in names]
        rest = [row.get(name, "") for name in ("error", "seconds")]
        writer.writerow([row["method"], row["pattern"], row.get("sparsity", ""), *scores, *rest])
    return file.getvalue()
