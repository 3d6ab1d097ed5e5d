"""The plots of the commands."""

import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from apt.evaluation.windows import spread
from apt.files.writing import write_file
from apt.locations.paths import expanded
from apt.output.report import Report
from apt.recovery.law import Law, Point
from apt.reporting.heat import Heat


def draw_candidates(
    candidates: Sequence[Mapping[str, Any]], path: Path, *, overwrite: bool = False
) -> None:
    """Draw the loss of each candidate of a search, and the Pareto front.

    Args:
        candidates: the entries of the report's ``structure``.
        path: the file to write.
        overwrite: True if a file there may be replaced.
    """
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axes, key, label in (
        (left, "cost", "share of the budget"),
        (right, "blocks", "blocks"),
    ):
        axes.plot(
            [entry[key] for entry in candidates],
            [entry["loss"] for entry in candidates],
            "o", color="tab:gray", markersize=4, label="candidates",
        )  # fmt: skip
        front = sorted((e for e in candidates if e["front"]), key=lambda entry: entry["cost"])
        axes.plot(
            [entry[key] for entry in front],
            [entry["loss"] for entry in front],
            "-o" if key == "cost" else "o", color="tab:blue", label="Pareto front",
        )  # fmt: skip
        axes.set_xlabel(label)
    left.set_ylabel("loss on calibration text")
    left.legend()
    _write(figure, path, overwrite)


def draw_sparsities(report: Report, path: Path, *, overwrite: bool = False) -> None:
    """Draw the sparsity of the sites of each kind, block by block.

    Args:
        report: the report of a run.
        path: the file to write.
        overwrite: True if a file there may be replaced.
    """
    kinds: dict[str, dict[int, list[float]]] = {}
    for site in report.sites:
        block = next((int(part) for part in site.name.split(".") if part.isdigit()), 0)
        kinds.setdefault(site.kind, {}).setdefault(block, []).append(site.sparsity)
    figure, axes = _pyplot().subplots(figsize=(8, 4))
    for kind, blocks in sorted(kinds.items()):
        means = [sum(values) / len(values) for values in blocks.values()]
        axes.plot(list(blocks), means, "-o", markersize=3, label=kind)
    axes.axhline(report.sparsity, color="tab:gray", linestyle=":", label="all sites")
    axes.set_xlabel("block")
    axes.set_ylabel("sparsity")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    _write(figure, path, overwrite)


def draw_heat(table: Heat, path: Path, *, overwrite: bool = False) -> None:
    """Draw the values of the sites by block and kind.

    Args:
        table: the table.
        path: the file to write.
        overwrite: True if a file there may be replaced.
    """
    values = [[cell.share if cell else float("nan") for cell in cells] for _, cells in table.rows]
    figure, axes = _pyplot().subplots(
        figsize=(2 + len(table.columns), 1.5 + 0.25 * len(table.rows))
    )
    # cividis is read alike with and without colour blindness.
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
    _write(figure, path, overwrite)


def draw_training(training: Mapping[str, Any], path: Path, *, overwrite: bool = False) -> None:
    """Draw the loss of each step of a recovery, and that on the samples held back.

    Args:
        training: the record of the training, in the report's ``recovery``.
        path: the file to write.
        overwrite: True if a file there may be replaced.
    """
    figure, axes = _pyplot().subplots(figsize=(7, 4))
    steps, losses = zip(*training["held_back"], strict=True)
    right = axes.twinx()
    right.plot(
        range(1, len(training["losses"]) + 1), training["losses"],
        color="tab:gray", linewidth=0.6, label="training loss (right)",
    )  # fmt: skip
    axes.plot(steps, losses, "-o", color="tab:blue", label="loss on held-back samples")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.set_zorder(right.get_zorder() + 1)
    axes.patch.set_visible(False)
    lines = [*axes.get_lines(), *right.get_lines()]
    axes.legend(lines, [line.get_label() for line in lines])
    _write(figure, path, overwrite)


def draw_law(points: Sequence[Point], law: Law, path: Path, *, overwrite: bool = False) -> None:
    """Draw the measured losses of each run, and the fitted law.

    Args:
        points: the measured losses.
        law: the fitted law.
        path: the file to write.
        overwrite: True if a file there may be replaced.
    """
    figure, axes = _pyplot().subplots(figsize=(7, 4.5))
    for name in dict.fromkeys(point.curve for point in points):
        run = sorted((p for p in points if p.curve == name), key=lambda point: point.tokens)
        tokens = [point.tokens for point in run]
        (line,) = axes.plot(tokens, [law.loss(point) for point in run], label=Path(name).name)
        axes.plot(tokens, [point.loss for point in run], "o", color=line.get_color(), markersize=4)
    axes.set_xscale("log")
    axes.set_xlabel("training tokens")
    axes.set_ylabel("nats per token (points: measured, lines: law)")
    axes.legend(fontsize="small")
    _write(figure, path, overwrite)


def draw_comparison(
    rows: Sequence[Mapping[str, Any]], path: Path, *, overwrite: bool = False
) -> None:
    """Draw the first metric of each text as bars with their intervals, by text and pattern.

    Args:
        rows: the rows of a comparison; the first one is the dense model.
        path: the file to write.
        overwrite: True if a file there may be replaced.
    """
    dense, *others = rows
    patterns = list(dict.fromkeys(row["pattern"] for row in others)) or [""]
    texts = list(dense["scores"])
    shape = {"figsize": (4 * len(patterns), 0.6 + 0.5 * len(rows) * len(texts)), "squeeze": False}
    figure, axes = _pyplot().subplots(len(texts), len(patterns), **shape)
    for line, text in zip(axes, texts, strict=True):
        metric = next(iter(dense["scores"][text]))
        for panel, pattern in zip(line, patterns, strict=True):
            chosen = [row for row in others if row["pattern"] == pattern]
            values = [row["scores"][text][metric] for row in chosen]
            panel.barh(range(len(chosen)), values, color="tab:blue")
            panel.set_yticks(range(len(chosen)), [row["method"] for row in chosen])
            for place, row in enumerate(chosen):
                if (found := spread(row, dense, text, metric)) is not None:
                    ends = found.low, found.high
                    panel.plot(ends, (place, place), "|-", color="black", linewidth=1)
            panel.axvline(dense["scores"][text][metric], color="black", linewidth=1)
            panel.invert_yaxis()
            panel.set_title(f"{text}, {pattern or 'others'}", fontsize="small")
            panel.set_xlabel(f"{metric} (line: dense)", fontsize="small")
    _write(figure, path, overwrite)


def _pyplot() -> Any:
    os.environ["MPLBACKEND"] = "agg"  # draws into files; matplotlib refuses an unknown one

    from matplotlib import pyplot

    return pyplot


def _write(figure: Any, path: Path, overwrite: bool) -> None:
    drawn = BytesIO()
    figure.tight_layout()
    figure.savefig(drawn, dpi=120, format=path.suffix.removeprefix("."))
    _pyplot().close(figure)
    write_file(expanded(path), drawn.getvalue(), overwrite=overwrite)
