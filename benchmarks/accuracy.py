"""All methods with all patterns on one model: perplexity on two texts, relative layer error, time.

The default is SmolLM2-135M-Instruct with the texts of ``benchmarks/common.py``: calibration on
summaries of Wikipedia articles, evaluation on other summaries and on quotations and jokes::

    python benchmarks/accuracy.py --methods ss alps admm --patterns 2:4 0.5 \\
        --json out/accuracy.json --plot out/accuracy.png

A method is NAME or NAME:EFFORT, followed by options of ``apt.PruneOptions``: ``/layer-wise``,
``/at-once``, ``/alpha=0``, ``/tuning_epochs=0``, ``/random_tokens=0.5``, ``/own_samples=8``.
``/allocation=owl`` is an allocation, which is computed once for each pattern and seed. Rows are
added to the JSON file as soon as they are measured. A row in the file is not measured again.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from common import FORTUNES, calibration_and_texts, known_rows, open_model, other_windows, save
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import apt
from apt.checkpoints.opened import Opened
from apt.evaluation.metrics import perplexity
from apt.planning.allocation import Unallocated
from apt.plugin.registry import registry

METHODS = [
    "magnitude", "wanda", "sparseswaps", "ss", "sm", "alps",
    "admm:fast/layer-wise", "admm/layer-wise", "admm:best/layer-wise",
    "admm:fast", "admm", "admm:best",
]  # fmt: skip
SWITCHES = {"layer-wise": {"error_aware": False}, "at-once": {"ordered": False}}
TUNED_ON = 16  # windows of each evaluation text, used to choose APT's defaults: not reported
Row = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model reference; SmolLM2 by default")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--patterns", nargs="+", default=["0.5", "0.6", "0.7", "2:4", "4:8"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--eval-samples", type=int, default=32)
    parser.add_argument(
        "--skip", type=int, default=TUNED_ON, help="leading windows to leave out; 0: tuning windows"
    )
    parser.add_argument("--text", help="a data source instead of the wiki summaries")
    parser.add_argument("--fortunes", type=Path, default=FORTUNES, help="folder of the second text")
    parser.add_argument("--dictionary", type=Path, help="a third text: foldoc.dict.dz")
    parser.add_argument(
        "--seed", type=int, nargs="+", help="each draws other samples, and is that of the runs"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def read_method(name: str) -> tuple[str, apt.PruneOptions, str | None]:
    """Parse a method with options: ``admm:fast/layer-wise``, ``wanda/allocation=owl``."""
    name, *words = name.split("/")
    method, _, effort = name.partition(":")
    values, allocation = {"effort": effort or "default"}, None
    for word in words:
        option, _, value = word.partition("=")
        if option == "allocation":
            allocation = value
        else:
            values |= SWITCHES[option] if option in SWITCHES else {option: json.loads(value)}
    return method, apt.PruneOptions(**values), allocation


@cache
def allocation_of(name: str, pattern: str) -> Callable[..., dict[str, float]]:
    """An allocation that is computed once for all error-aware, and once for other runs."""
    known: dict[bool, dict[str, float]] = {}

    def allocate(given: Unallocated) -> dict[str, float]:
        if given.error_aware not in known:
            started = time.perf_counter()
            known[given.error_aware] = registry().allocations.get(name).load()(given)
            print(f"{name} at {pattern}: {time.perf_counter() - started:.1f} s", flush=True)
        return known[given.error_aware]

    return allocate


def prune(
    model: Opened,
    name: str,
    pattern: str,
    tokens: Tensor,
    others: Tensor,
    tokenizer: Any,
    seed: int = 0,
) -> tuple[nn.Module, Row]:
    """A pruned copy, with its layer error and times."""
    method, options, allocation = read_method(name)
    computed = allocation not in (None, "uniform")
    started = time.perf_counter()
    module, report = apt.prune_copy(
        model.module,
        tokens,
        pattern=pattern,
        adapter=model.spec.name,
        method=method,
        options=options,
        tokenizer=tokenizer,
        seed=seed,
        other_tokens=others,
        allocation=allocation_of(allocation, pattern) if computed else allocation,
    )
    return module, {
        "zeros": report.sparsity,
        "error": report.relative_layer_error,
        "solve": sum(site.seconds for site in report.sites),
        "seconds": time.perf_counter() - started,
    }


def measure(options: argparse.Namespace, known: list[Row]) -> Iterator[Row]:
    """One row for each run."""
    model, tokenizer = open_model(options.model)
    measured = {key(row): row for row in known}
    runs = [(m, p) for p in options.patterns for m in options.methods]
    seeds = options.seed or [None]
    for seed in seeds:
        allocation_of.cache_clear()
        given = argparse.Namespace(**{**vars(options), "seed": seed})
        tokens, held_out = calibration_and_texts(given, tokenizer)
        others = other_windows(given, tokenizer)
        for method, pattern in [("dense", ""), *runs] if seed == seeds[0] else runs:
            row: Row = {"method": method, "pattern": pattern, "seed": seed}
            if key(row) in measured:
                yield measured[key(row)]
                continue
            module = model.module
            if method != "dense":
                module, found = prune(model, method, pattern, tokens, others, tokenizer, seed or 0)
                row |= found
            with model.adapter.running(module):
                row |= {name: perplexity(module, text) for name, text in held_out.items()}
            yield row


def key(row: Row) -> tuple[str, str, int | None]:
    """The method, the pattern and the seed of a row."""
    return row["method"], row["pattern"], row.get("seed")


def plot(path: Path, rows: list[Row]) -> None:
    """Plot the perplexity of every method, with one panel for each text and pattern."""
    import matplotlib.pyplot as plt

    patterns = list(dict.fromkeys(row["pattern"] for row in rows if row["pattern"]))
    held_out = [name for name in ("wiki", "fortunes", "dictionary") if name in rows[0]]
    shape = {"figsize": (3.2 * len(patterns), 3.5 * len(held_out)), "squeeze": False}
    figure, axes = plt.subplots(len(held_out), len(patterns), **shape)
    for line, text in zip(axes, held_out, strict=True):
        for panel, pattern in zip(line, patterns, strict=True):
            chosen = [row for row in rows if row["pattern"] == pattern]
            panel.barh([row["method"] for row in chosen], [row[text] for row in chosen])
            panel.axvline(rows[0][text], color="black", linewidth=1)
            panel.set(xscale="log", title=f"{text}, {pattern}", xlabel="perplexity")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    options, console = arguments(), Console()
    known, rows = known_rows(options), []
    held_out = ["wiki", "fortunes", *(["dictionary"] if options.dictionary else [])]
    columns = [*held_out, "error", "solve", "seconds"]
    table = Table("method", "pattern", *columns)
    for row in measure(options, known):
        rows.append(row)
        shown = [f"{row[key]:.4g}" if key in row else "" for key in columns]
        table.add_row(row["method"], row["pattern"], *shown)
        console.print(*shown, *key(row))
        fresh = {key(r) for r in rows}
        others = [r for r in known if key(r) not in fresh]
        save(options.json, rows + others, options)
    console.print(table)
    if options.plot:
        plot(options.plot, rows)


if __name__ == "__main__":
    main()
