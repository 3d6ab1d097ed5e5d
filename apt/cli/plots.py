"""The plots of ``shrink --search``, ``fit`` and ``recover``."""

import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from apt.files.writing import write_file
from apt.locations.paths import expanded


def draw_candidates(
    candidates: Sequence[Mapping[str, Any]], path: Path, *, overwrite: bool = False
) -> None:
    """Draw the loss of each candidate of a search, and the Pareto front.

    Args:
        candidates: the entries of the report's ``structure``.
        path: the file to write.
        overwrite: True if a file there may be replaced.
    """
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axes, key, label in ((left, "cost", "share of the budget"), (right, "blocks", "blocks")):
        axes.plot(
            [candidate[key] for candidate in candidates],
            [candidate["loss"] for candidate in candidates],
            "o", color="tab:gray", markersize=4, label="candidates",
        )  # fmt: skip
        front = [candidate for candidate in candidates if candidate["front"]]
        front.sort(key=lambda candidate: candidate["cost"])
        axes.plot(
            [candidate[key] for candidate in front],
            [candidate["loss"] for candidate in front],
            "-o" if key == "cost" else "o", color="tab:blue", label="Pareto front",
        )  # fmt: skip
        axes.set_xlabel(label)
    left.set_ylabel("loss on calibration text")
    left.legend()
    write_figure(figure, path, overwrite=overwrite)


def draw_frontier(fit: Mapping[str, Any], path: Path, *, overwrite: bool = False) -> None:
    """Draw the predicted loss of the best outputs of ten sizes or speeds, and that of the output.

    Args:
        fit: the report's entry of a fit.
        path: the file to write.
        overwrite: True if a file there may be replaced.
    """
    figure, axes = pyplot().subplots(figsize=(7, 4))
    costs, losses = zip(*fit["frontier"], strict=True)
    speed = fit.get("speed")
    unit, per, own = (
        ("MiB", 2**20, fit["size"]) if speed is None else ("tokens/s", 1, speed["measured"])
    )
    axes.plot([cost / per for cost in costs], losses, "-o", color="tab:blue", label="best files")
    axes.plot(own / per, fit["loss"], "s", color="tab:red", label="this file")
    axes.set_xlabel(unit)
    axes.set_ylabel("predicted rise of the loss, nats per token")
    axes.legend()
    write_figure(figure, path, overwrite=overwrite)


def draw_training(training: Mapping[str, Any], path: Path, *, overwrite: bool = False) -> None:
    """Draw the loss of each step of a recovery, and the loss on the samples held back.

    Args:
        training: the record of the training, in the report's ``recovery``.
        path: the file to write.
        overwrite: True if a file there may be replaced.
    """
    figure, axes = pyplot().subplots(figsize=(7, 4))
    steps, losses = zip(*training["held_back"], strict=True)
    right = axes.twinx()
    right.plot(
        range(1, len(training["losses"]) + 1), training["losses"],
        color="tab:gray", linewidth=0.6, label="training loss (right)",
    )  # fmt: skip
    axes.plot(steps, losses, "-o", color="tab:blue", label="loss on held-back samples")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_zorder(right.get_zorder() + 1)
    axes.patch.set_visible(False)
    lines = [*axes.get_lines(), *right.get_lines()]
    axes.legend(lines, [line.get_label() for line in lines])
    write_figure(figure, path, overwrite=overwrite)


def pyplot() -> Any:
    """``matplotlib.pyplot``, which draws into files."""
    os.environ["MPLBACKEND"] = "agg"  # draws into files; matplotlib refuses an unknown one

    from matplotlib import pyplot

    return pyplot


def write_figure(figure: Any, path: Path, *, overwrite: bool = False) -> None:
    """Write a figure into a .png, .svg or .pdf file, and close it."""
    content = BytesIO()
    figure.tight_layout()
    figure.savefig(content, dpi=120, format=path.suffix.removeprefix("."))
    pyplot().close(figure)
    write_file(expanded(path), content.getvalue(), overwrite=overwrite)
