"""The pictures of the documents, from the figures in ``benchmarks/results``::

python benchmarks/plots.py [DIR]        # by default docs/images
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tables import COLUMNS, FORMER, NAMES, ORDER, calibrated_on

ROOT = Path(__file__).parent.parent
TEXTS = (("wiki", "Wikipedia"), ("fortunes", "quotations and jokes"))
Record = dict[str, Any]
# Colours of Okabe and Ito, which remain apart with colour blindness; markers differ as well.
LINES = {
    "wanda": ("Wanda", "#999999", "s"),
    "ss": ("SparseGPT", "#E69F00", "^"),
    "alps": ("ALPS", "#CC79A7", "v"),
    "admm/allocation=uniform": ("APT, --allocation uniform", "#0072B2", "o"),
    "admm": ("APT", "#009E73", "D"),
}


def by_pattern(
    axes: Axes, found: Mapping[tuple[str, str], float], dense: float, patterns: list[str]
) -> None:
    """Draw a line for each method, from pattern to pattern, and one for the dense model."""
    for method, (name, colour, marker) in LINES.items():
        if (method, patterns[0]) in found:
            values = [found[method, pattern] for pattern in patterns]
            axes.plot(range(len(patterns)), values, color=colour, marker=marker, label=name)
    axes.axhline(dense, color="black", linewidth=1, linestyle=":")
    axes.annotate("dense", (0, dense), va="bottom", fontsize="small")
    axes.set_yscale("log")
    axes.set_xticks(range(len(patterns)), [COLUMNS.get(p, p) for p in patterns])
    axes.grid(alpha=0.3)


def sparsity(record: Record) -> Figure:
    """Perplexity against sparsity, method by method, on both texts."""
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axes, (text, title) in zip(panels, TEXTS, strict=True):
        found = {(row["method"], row["pattern"]): row[text] for row in record["rows"]}
        by_pattern(axes, found, record["dense"][text], ["0.6", "0.7", "0.8"])
        axes.set_xlabel("zeros")
        axes.set_title(title, fontsize="medium")
    panels[0].set_ylabel("perplexity of SmolLM2-135M")
    panels[0].legend(fontsize="small")
    return figure


def methods(record: Record) -> Figure:
    """Perplexity and divergence of a comparison by pattern, method by method, on both texts."""
    dense, *rows = record["rows"]
    patterns = [pattern for pattern in ORDER if any(row["pattern"] == pattern for row in rows)]
    figure, grid = pyplot.subplots(2, 2, figsize=(9, 6.6), sharey="row")
    for line, metric in zip(grid, ("perplexity", "divergence"), strict=True):
        for axes, (text, title) in zip(line, TEXTS, strict=True):
            found = {
                (row["method"], row["pattern"]): row["scores"][f"{text}.jsonl"][metric]
                for row in rows
            }
            start = dense["scores"][f"{text}.jsonl"][metric]
            by_pattern(axes, found, start, patterns)
            axes.set_title(title, fontsize="medium")
    grid[0, 0].set_ylabel("perplexity of SmolLM2-135M")
    grid[1, 0].set_ylabel("divergence from the dense model, nats")
    for axes in grid[1]:
        axes.set_yscale("linear")
    grid[0, 0].legend(fontsize="small")
    return figure


def seeds(record: Record) -> Figure:
    """Perplexity by pattern, with a marker for each seed, on both texts."""
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6))
    dense, *rows = record["rows"]
    patterns = [pattern for pattern in ORDER if any(row["pattern"] == pattern for row in rows)]
    kinds = ((FORMER, "#0072B2", "o", -0.1), ("admm", "#E69F00", "^", 0.1))
    for axes, (text, title) in zip(panels, TEXTS, strict=True):
        for method, colour, marker, shift in kinds:
            shown = [row for row in rows if row["method"] == method]
            places = [patterns.index(row["pattern"]) + shift for row in shown]
            axes.scatter(
                places, [row[text] for row in shown], color=colour, marker=marker,
                label=NAMES[method].replace("`", ""), alpha=0.7,
            )  # fmt: skip
        axes.axhline(dense[text], color="black", linewidth=1, linestyle=":")
        axes.annotate("dense", (0, dense[text]), va="bottom", fontsize="small")
        axes.set_yscale("log")
        axes.set_xticks(range(len(patterns)), [COLUMNS.get(p, p) for p in patterns])
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("perplexity of SmolLM2-135M")
    panels[0].legend(fontsize="small")
    return figure


def tokens(record: Record) -> Figure:
    """Layer error and perplexities against calibration tokens, by effort and length of samples."""
    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.6))
    rows = sorted(record["rows"], key=calibrated_on)
    titles = ("relative layer error", *(f"perplexity, {title}" for _, title in TEXTS))
    for axes, key, title in zip(panels, ("error", "wiki", "fortunes"), titles, strict=True):
        for effort, colour, marker in (("fast", "#E69F00", "^"), ("default", "#0072B2", "o")):
            chosen = [row for row in rows if row["method"] == f"admm:{effort}"]
            axes.plot(
                [calibrated_on(row) for row in chosen], [row[key] for row in chosen],
                color=colour, marker=marker, label=effort,
            )  # fmt: skip
        counts = sorted({calibrated_on(row) for row in rows})
        axes.set_xscale("log")
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.minorticks_off()
        axes.set_xlabel("calibration tokens")
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    return figure


def minutes(record: Record) -> Figure:
    """Perplexity against the time of the run, pattern by pattern, on both texts."""
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6))
    dense, *rows = record["rows"]
    shown = sorted((row for row in rows if row["minutes"]), key=lambda row: row["minutes"])
    times = sorted({row["minutes"] for row in shown})
    lines = (("0.7", "#E69F00", "^"), ("2:4", "#0072B2", "o"), ("0.5", "#009E73", "D"))
    for axes, (text, title) in zip(panels, TEXTS, strict=True):
        for pattern, colour, marker in lines:
            found = [(row["minutes"], row[text]) for row in shown if row["pattern"] == pattern]
            name = COLUMNS.get(pattern, pattern)
            axes.plot(*zip(*found, strict=True), color=colour, marker=marker, label=name)
        axes.axhline(dense[text], color="black", linewidth=1, linestyle=":")
        axes.annotate("dense", (times[0], dense[text]), va="bottom", fontsize="small")
        axes.set_xscale("log")
        axes.set_xticks(times, [f"{time:g}" for time in times])
        axes.minorticks_off()
        axes.set_xlabel("--minutes, on two cores")
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("perplexity of SmolLM2-135M")
    panels[0].legend(fontsize="small")
    return figure


def deployments(record: Record) -> Figure:
    """Perplexity against the speed of decoding, on both texts; the models have numbers."""
    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.8), width_ratios=(1, 1, 0.8))
    runtimes = {"transformers": ("#0072B2", "o"), "llama.cpp": ("#E69F00", "^")}
    rows = list(enumerate(record["rows"], 1))
    for axes, (text, title) in zip(panels, TEXTS, strict=False):
        for runtime, (colour, marker) in runtimes.items():
            shown = [(n, row) for n, row in rows if row["runtime"] == runtime]
            places = [(row["threads"]["2"]["decode"], row[text]) for _, row in shown]
            axes.scatter(*zip(*places, strict=True), color=colour, marker=marker, label=runtime)
            for (number, _), place in zip(shown, places, strict=True):
                axes.annotate(
                    str(number), place, xytext=(4, 4), textcoords="offset points", fontsize="small"
                )
        axes.set_xlabel("tokens per second, on two threads")
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("perplexity of SmolLM2-135M")
    panels[0].legend(fontsize="small")
    names = "\n".join(f"{number}  {row['model'].replace('`', '')}" for number, row in rows)
    panels[2].text(0, 1, names, va="top", fontsize="small", linespacing=1.5)
    panels[2].axis("off")
    return figure


def fit(record: Record) -> Figure:
    """Perplexity against the size of a GGUF file, on both texts."""
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6))
    kinds = (("llama.cpp", "#E69F00", "^", ""), ("apt-prune fit", "#0072B2", "o", "-"))
    for axes, (text, title) in zip(panels, TEXTS, strict=True):
        dense = next(row for row in record["rows"] if row["model"] == "F16")[text]
        for kind, colour, marker, line in kinds:
            shown = sorted(
                (row["bytes"] / 2**20, row[text])
                for row in record["rows"]
                if row["model"].startswith("fit") == (kind == "apt-prune fit")
                and row["bytes"] < 110 * 2**20
                and row[text] < 2 * dense
            )
            axes.plot(
                *zip(*shown, strict=True), color=colour, marker=marker, linestyle=line, label=kind
            )
        axes.axhline(dense, color="black", linewidth=1, linestyle=":")
        axes.set_xlabel("MiB")
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("perplexity of SmolLM2-135M in llama.cpp")
    panels[0].legend(fontsize="small")
    return figure


PICTURES: Mapping[str, tuple[str, Callable[[Record], Figure]]] = {
    "sparsity.png": ("allocation", sparsity),
    "methods.png": ("smollm2", methods),
    "seeds.png": ("seeds", seeds),
    "tokens.png": ("tokens", tokens),
    "minutes.png": ("minutes", minutes),
    "deployments.png": ("deployments", deployments),
    "fit.png": ("fit", fit),
}
"""The file of the results that each picture is made from, and the function that draws it."""


def draw(name: str, folder: Path) -> None:
    """Write a picture into a folder."""
    file, make = PICTURES[name]
    path = ROOT / f"benchmarks/results/{file}.json"
    figure = make(json.loads(path.read_text(encoding="utf-8")))
    figure.tight_layout()
    figure.savefig(folder / name, dpi=110)
    pyplot.close(figure)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/images"
    folder.mkdir(exist_ok=True)
    for name in PICTURES:
        draw(name, folder)


if __name__ == "__main__":
    main()
