"""Error and time of every method, on Gram matrices of a real model.

The Gram matrices of a few blocks are computed from the activations of the dense model. Every method
then solves the same sites::

    python benchmarks/solver.py --json out/solver.json --plot out/solver.png
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from common import open_model, sample, save, wiki
from rich.console import Console
from rich.table import Table

from apt.calibration.batches import OpenBlock, enter
from apt.calibration.capture import Capture
from apt.plugin.registry import registry
from apt.solver import Gram, SolverOptions, parse_pattern, relative_layer_error

METHODS = ["wanda", "ss", "sm", "alps", "admm:fast", "admm:default", "admm:best"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model reference; SmolLM2 by default")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="NAME or NAME:EFFORT")
    parser.add_argument("--patterns", nargs="+", default=["2:4", "0.7"])
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 4, 12, 20])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument(
        "--repeats", type=int, default=2, help="number of runs; the shortest time is reported"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


@torch.no_grad()
def capture(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The layers of each block, and the Gram matrices of their inputs."""
    model, tokenizer = open_model(options.model)
    tokens = sample(tokenizer, wiki()[0], options.samples, options.seqlen)
    batches = enter(model.adapter, model.module, tokens)
    made = []
    for index, (name, block) in enumerate(model.adapter.blocks(model.module)):
        if index > max(options.blocks):
            break
        if index in options.blocks:
            sites = model.adapter.sites(block)
            seen = Capture(block, sites)
            seen.run(OpenBlock(model.adapter, block, index, batches))
            layers = [
                (f"{name}.{s.name}", s.oriented(s.weight(block).data).float().clone(), s.input)
                for s in sites
            ]
            sums = {k: (v.gram.matrix, v.gram.tokens) for k, v in seen.sums.items()}
            made.append({"layers": layers, "sums": sums})
        for batch in batches:
            batch.state = model.adapter.step(block, batch.state, batch.calls[index])
    return made


def solve(blocks: list[dict[str, Any]], name: str, pattern: str) -> tuple[float, list[float]]:
    """The seconds, and the relative error of every layer; sites share factorisations."""
    method, _, effort = name.partition(":")
    spec = registry().methods.get(method)
    wanted = parse_pattern(pattern)
    wanted = wanted.counted(spec.per) if hasattr(wanted, "counted") else wanted
    options, function = SolverOptions(effort=effort or "default"), spec.load()
    seconds, errors = 0.0, []
    for block in blocks:
        grams = {key: Gram.from_sum(*value) for key, value in block["sums"].items()}
        for _, weight, key in block["layers"]:
            started = time.perf_counter()
            solution = function(weight, grams[key], wanted, options)
            seconds += time.perf_counter() - started
            errors.append(relative_layer_error(weight, solution.weight, grams[key].matrix))
    return seconds, errors


def measure(options: argparse.Namespace, blocks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row for each method and pattern."""
    for pattern in options.patterns:
        baseline: float | None = None
        for name in options.methods:
            runs = [solve(blocks, name, pattern) for _ in range(options.repeats)]
            seconds, errors = min(run[0] for run in runs), runs[0][1]
            baseline = seconds if name == "ss" else baseline
            yield {
                "pattern": pattern,
                "method": name,
                "error": fmean(errors),
                "seconds": seconds,
                "ratio": seconds / baseline if baseline else None,
            }


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Plot error against time, with one panel for each pattern."""
    import matplotlib.pyplot as plt

    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    figure, axes = plt.subplots(1, len(patterns), figsize=(5 * len(patterns), 4), squeeze=False)
    for panel, pattern in zip(axes[0], patterns, strict=True):
        for row in (row for row in rows if row["pattern"] == pattern):
            panel.plot(row["seconds"], row["error"], "o")
            place = (row["seconds"], row["error"])
            panel.annotate(row["method"], place, xytext=(5, 5), textcoords="offset points")
        panel.set(xscale="log", title=pattern, xlabel="solve time, s", ylabel="mean relative error")
        panel.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    options, console = arguments(), Console()
    rows, table = [], Table("pattern", "method", "mean error", "seconds", "of SparseGPT's")
    for row in measure(options, capture(options)):
        rows.append(row)
        ratio = f"{row['ratio']:.2f}" if row["ratio"] else ""
        seconds = f"{row['seconds']:.2f}"
        table.add_row(row["pattern"], row["method"], f"{row['error']:.4f}", seconds, ratio)
        console.print(row)
    console.print(table)
    save(options.json, rows)
    if options.plot:
        plot(options.plot, rows)


if __name__ == "__main__":
    main()
