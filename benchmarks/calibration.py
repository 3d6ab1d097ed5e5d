"""Accuracy against calibration tokens: layer error, and perplexity on two texts.

SmolLM2-135M-Instruct with the texts of ``benchmarks/common.py``. Both the number and the length of
the samples grow::

    python benchmarks/calibration.py --shapes 8x512 128x2048 --json out/tokens.json

A row in the JSON file is not measured again.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import FORTUNES, fortunes, known_rows, open_model, sample, save, wiki
from rich.console import Console
from rich.table import Table

import apt
from apt.evaluation.metrics import perplexity

SHAPES = ["8x512", "32x512", "128x512", "128x2048"]
TUNED_ON = 16  # windows of each evaluation text, used to choose APT's defaults: not reported
Row = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="samples x tokens")
    parser.add_argument("--efforts", nargs="+", default=["fast", "default"])
    parser.add_argument("--patterns", nargs="+", default=["2:4"])
    parser.add_argument("--eval-samples", type=int, default=16)
    parser.add_argument("--fortunes", type=Path, default=FORTUNES)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def measure(options: argparse.Namespace, known: list[Row]) -> Iterator[Row]:
    """One row for each shape and effort."""
    model, tokenizer = open_model()
    calibration, evaluation = wiki()
    held_out = {
        name: sample(tokenizer, text, options.eval_samples, 512, TUNED_ON)
        for name, text in (("wiki", evaluation), ("fortunes", fortunes(options.fortunes)))
    }
    measured = {(row["tokens"], row["method"], row["pattern"]): row for row in known}
    for shape in options.shapes:
        samples, seqlen = map(int, shape.split("x"))
        for method in (f"admm:{effort}" for effort in options.efforts):
            for pattern in options.patterns:
                if (row := measured.get((shape, method, pattern))) is None:
                    module, report = apt.prune_copy(
                        model.module, sample(tokenizer, calibration, samples, seqlen),
                        pattern=pattern, adapter=model.spec.name, tokenizer=tokenizer,
                        options=apt.PruneOptions(effort=method.partition(":")[2]),
                    )  # fmt: skip
                    row = {
                        "tokens": shape, "method": method, "pattern": pattern,
                        "error": report.relative_layer_error,
                        **{name: perplexity(module, text) for name, text in held_out.items()},
                    }  # fmt: skip
                yield row


def main() -> None:
    options, console = arguments(), Console()
    rows: list[Row] = []
    known = known_rows(options)
    columns = ["wiki", "fortunes", "error"]
    table = Table("tokens", "method", "pattern", *columns)
    for row in measure(options, known):
        rows.append(row)
        shown = [f"{row[key]:.4g}" for key in columns]
        table.add_row(row["tokens"], row["method"], row["pattern"], *shown)
        console.print(*shown, row["tokens"], row["method"], row["pattern"])
        save(options.json, rows + [r for r in known if r not in rows], options)
    console.print(table)


if __name__ == "__main__":
    main()
