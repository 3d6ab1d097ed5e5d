"""The plot of the candidates of a search."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw(candidates: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the loss of each candidate against its number of blocks, and the Pareto front.

    Args:
        candidates: the entries of the report's ``structure``.
        path: the file to write.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

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
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
