"""Runs of a given time: perplexity on two texts after ``prune --minutes``, and without it.

The default is SmolLM2-135M-Instruct with the texts of ``benchmarks/common.py``: calibration and
training on summaries of Wikipedia articles, evaluation on other summaries and on quotations and
jokes. It is converted to a directory first, since a GGUF file takes seconds to read. Each run is
the command line in a process of its own, with all cores that it finds::

    python benchmarks/minutes.py --patterns 0.5 2:4 0.7 --minutes 2 5 10 30 --json out/minutes.json

With ``--minutes`` 0 a row is a run without that option, with ``--samples`` of ``--seqlen`` tokens.
``--own-samples`` adds text that the dense model generates to the pruning and to the training.
Rows are added to the JSON file as soon as they are measured. A row in the file is not measured
again.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import (
    FORTUNES,
    calibration_and_texts,
    calibration_file,
    known_rows,
    open_model,
    save,
    smollm2,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor

from apt.checkpoints.copies import REPORT
from apt.checkpoints.opened import Opened
from apt.evaluation.metrics import perplexity

TUNED_ON = 16  # windows of each evaluation text, used to choose APT's defaults: not reported
Row = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model reference; SmolLM2 by default")
    parser.add_argument("--patterns", nargs="+", default=["0.5", "2:4", "0.7"])
    parser.add_argument("--minutes", dest="rows", nargs="+", type=float, default=[0, 2, 5, 10, 30])
    parser.add_argument("--own-samples", nargs="+", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--eval-samples", type=int, default=16)
    parser.add_argument(
        "--skip", type=int, default=TUNED_ON, help="leading windows to leave out; 0: tuning windows"
    )
    parser.add_argument("--text", help="a data source instead of the wiki summaries")
    parser.add_argument("--fortunes", type=Path, default=FORTUNES, help="folder of the second text")
    parser.add_argument("--dictionary", type=Path, help="a third text: foldoc.dict.dz")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def directory(reference: str | None, folder: Path) -> str:
    """The model, or a directory of SmolLM2 that is made in ``folder``."""
    if reference is not None:
        return reference
    place = folder / "smollm2"
    command = [sys.executable, "-m", "apt", "convert", str(smollm2()), "--output", str(place)]
    subprocess.run(command, check=True)
    return str(place)


def run(options: argparse.Namespace, model: str, key: tuple[str, float, int], folder: Path) -> Row:
    """Prune by the command line, and return the time and what the report has of the training."""
    pattern, minutes, own = key
    text = options.text or str(calibration_file(folder))
    given = ["--minutes", str(minutes)]
    if not minutes:
        given = ["--samples", str(options.samples), "--seqlen", str(options.seqlen)]
    given += ["--own-samples", str(own)] if own else []
    command = [
        sys.executable, "-m", "apt", "prune", model, "--output", str(folder / "pruned"),
        "--pattern" if ":" in pattern else "--sparsity", pattern, "--calibration", text, *given,
    ]  # fmt: skip
    started = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - started
    report = json.loads((folder / "pruned" / REPORT).read_text(encoding="utf-8"))
    training = (report.get("recovery") or {}).get("training", {})
    return {
        "seconds": seconds,
        "effort": report["options"]["effort"],
        "own": own,
        "tokens": math.prod(report["calibration"]["shape"]),
        "zeros": report["sparsity"],
        "steps": len(training.get("losses", ())),
        "training": {key: training.get(key) for key in ("seconds", "best", "held_back")},
    }


def key_of(row: Row) -> tuple[str, float, int]:
    """The pattern, the minutes and the own samples of a row."""
    return row["pattern"], row["minutes"], row.get("own", 0)


def scores(pruned: Opened, held_out: dict[str, Tensor]) -> dict[str, float]:
    with pruned.adapter.running(pruned.module):
        return {name: perplexity(pruned.module, text) for name, text in held_out.items()}


def measure(options: argparse.Namespace, known: list[Row]) -> Iterator[Row]:
    """One row for each run."""
    model, tokenizer = open_model(options.model)
    _, held_out = calibration_and_texts(options, tokenizer)
    measured = {key_of(row): row for row in known}
    keys = itertools.product(options.patterns, options.rows, options.own_samples)
    yield measured.get(("dense", 0, 0)) or {
        "pattern": "dense",
        "minutes": 0,
        **scores(model, held_out),
    }
    del model
    for key in keys:
        if row := measured.get(key):
            yield row
            continue
        with tempfile.TemporaryDirectory() as folder:
            place = directory(options.model, Path(folder))
            row = run(options, place, key, Path(folder))
            pruned, _ = open_model(str(Path(folder) / "pruned"))
            yield {"pattern": key[0], "minutes": key[1], **scores(pruned, held_out), **row}


def main() -> None:
    options, console = arguments(), Console()
    known, rows = known_rows(options), list[Row]()
    columns = [
        "pattern",
        "minutes",
        "own",
        "wiki",
        "fortunes",
        "effort",
        "tokens",
        "steps",
        "seconds",
    ]
    table = Table(*columns)
    for row in measure(options, known):
        rows.append(row)
        cells = [row.get(key, "") for key in columns]
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells))
        fresh = {key_of(r) for r in rows}
        others = [r for r in known if key_of(r) not in fresh]
        save(options.json, rows + others, options)
        console.print(table)


if __name__ == "__main__":
    main()
