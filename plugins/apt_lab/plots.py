"""The plots of the commands."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apt.console import pyplot, write_figure
from apt_lab.law import Law, Point
from apt_lab.reporting.heat import Heat
from apt_lab.windows import spread


def draw_heat(table: Heat, path: Path, *, overwrite: bool = False) -> None:
    """Draw the values of the sites by block and kind.

    Args:
        table: the table.
        path: the file to write.
        overwrite: True if an existing file may be replaced.
    """
    values = [[cell.share if cell else float("nan") for cell in cells] for _, cells in table.rows]
    figure, axes = pyplot().subplots(figsize=(2 + len(table.columns), 1.5 + 0.25 * len(table.rows)))
    # cividis is readable with colour blindness too.
    axes.imshow(values, cmap="cividis", aspect="auto")
    for line, (_, cells) in enumerate(table.rows):
        for column, cell in enumerate(cells):
            if cell is not None:
                color = "black" if cell.share > 55 else "white"
                axes.text(
                    column, line, cell.text, ha="center", va="center", fontsize="x-small",
                    color=color,
                )  # fmt: skip
    axes.set_xticks(range(len(table.columns)), [table.short(c) for c in table.columns], rotation=30)
    axes.set_yticks(range(len(table.rows)), [block for block, _ in table.rows], fontsize="x-small")
    axes.set_title(f"{table.title}: {table.lowest} to {table.highest}", fontsize="small")
    write_figure(figure, path, overwrite=overwrite)


def draw_law(points: Sequence[Point], law: Law, path: Path) -> None:
    """Draw the measured losses of each run, and the fitted law, into a new file."""
    figure, axes = pyplot().subplots(figsize=(7, 4.5))
    for name in dict.fromkeys(point.curve for point in points):
        run = sorted((p for p in points if p.curve == name), key=lambda point: point.tokens)
        tokens = [point.tokens for point in run]
        (line,) = axes.plot(tokens, [law.loss(point) for point in run], label=Path(name).name)
        axes.plot(tokens, [point.loss for point in run], "o", color=line.get_color(), markersize=4)
    axes.set_xscale("log")
    axes.set_xlabel("training tokens")
    axes.set_ylabel("nats per token (points: measured, lines: law)")
    axes.legend(fontsize="small")
    write_figure(figure, path, overwrite=False)


def draw_comparison(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the first metric of each text as bars with their intervals, by text and pattern.

    Args:
        rows: the rows of a comparison; the first one is the dense model.
        path: the file to write, or to replace.
    """
    dense, *others = rows
    patterns = list(dict.fromkeys(row["pattern"] for row in others)) or [""]
    texts = list(dense["scores"])
    shape = {"figsize": (4 * len(patterns), 0.6 + 0.5 * len(rows) * len(texts)), "squeeze": False}
    figure, axes = pyplot().subplots(len(texts), len(patterns), **shape)
    for line, text in zip(axes, texts, strict=True):
        metric = next(iter(dense["scores"][text]))
        for panel, pattern in zip(line, patterns, strict=True):
            panel_rows = [row for row in others if row["pattern"] == pattern]
            values = [row["scores"][text][metric] for row in panel_rows]
            panel.barh(range(len(panel_rows)), values, color="tab:blue")
            panel.set_yticks(range(len(panel_rows)), [row["method"] for row in panel_rows])
            for position, row in enumerate(panel_rows):
                if (interval := spread(row, dense, text, metric)) is not None:
                    ends = interval.low, interval.high
                    panel.plot(ends, (position, position), "|-", color="black", linewidth=1)
            panel.axvline(dense["scores"][text][metric], color="black", linewidth=1)
            panel.invert_yaxis()
            panel.set_title(f"{text}, {pattern or 'others'}", fontsize="small")
            panel.set_xlabel(f"{metric} (line: dense)", fontsize="small")
    write_figure(figure, path, overwrite=True)
