"""Packed directories of given sizes, by zeros, by bits, and by both: perplexities and levels.

Each size is fitted with ``--may bits``, ``--may zeros`` and with both, from one table of losses::

    python benchmarks/fit_packed.py zoo:llama --sizes 1.6MB 1.5MB 1.4MB --eval builtin
    python benchmarks/fit_packed.py SmolLM2.gguf --dtype bfloat16 --samples 16 --seqlen 512 \\
        --calibration wiki.jsonl --eval held-out.jsonl --sizes 130MiB
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from common import known_rows, save
from rich.console import Console
from rich.table import Table

from apt import Report

MEANS = ("zeros,bits", "bits", "zeros")
Row = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--sizes", nargs="+", required=True)
    parser.add_argument("--means", nargs="+", default=MEANS)
    parser.add_argument("--eval", dest="evaluation", default="builtin")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--work", type=Path, default=Path("out/fit-packed"))
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def fitted(size: str, means: str, options: argparse.Namespace) -> Path | None:
    """The directory of a size; the first one has the table of losses for all others.

    None if nothing of this size can be made by these means.
    """
    first = options.work / f"{options.sizes[0]}-{MEANS[0]}"
    path: Path = options.work / f"{size}-{means}"
    words = [
        "fit", options.model, "--for", "packed", "--size", size, "--may", means, "--output", path,
        "--calibration", options.calibration, "--eval", options.evaluation,
        "--samples", options.samples, "--seqlen", options.seqlen, "--dtype", options.dtype,
        *(["--from", first] if path != first else []),
    ]  # fmt: skip
    if path.is_dir():
        return path
    done = subprocess.run([sys.executable, "-m", "apt", *map(str, words)])
    if done.returncode == 2:  # too small for these means
        return None
    done.check_returncode()
    return path


def row_of(size: str, means: str, path: Path | None) -> Row:
    """The row of a directory."""
    row: Row = {"size": size, "means": means}
    if path is None:
        return row
    report = Report.read(path)
    return {
        **row,
        "bytes": report.fit["size"],
        "expected": report.fit["expected"],
        "predicted": report.fit["loss"],
        "before": report.scores["before"]["perplexity"],
        "after": report.scores["after"]["perplexity"],
        "levels": dict(Counter(report.fit["levels"].values()).most_common()),
        "seconds": report.seconds,
    }


def show(rows: list[Row]) -> None:
    table = Table("size", "means", "bytes", "perplexity", "predicted rise, nats", "levels")
    for row in rows:
        if "bytes" not in row:
            table.add_row(row["size"], row["means"], "too small")
            continue
        levels = ", ".join(f"{count} × {level}" for level, count in row["levels"].items())
        table.add_row(
            row["size"], row["means"], f"{row['bytes']:,}", f"{row['after']:.3f}",
            f"{row['predicted']:.4f}", levels,
        )  # fmt: skip
    Console().print(table)


def main() -> None:
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    known = {(row["size"], row["means"]): row for row in known_rows(options)}
    rows = list[Row]()
    for size in options.sizes:
        for means in options.means:
            row = known.get((size, means)) or row_of(size, means, fitted(size, means, options))
            rows.append(row)
            print(json.dumps(row), flush=True)
            save(options.json, rows, options)
    show(rows)


if __name__ == "__main__":
    main()
