"""The peak memory of streamed runs, and what ``--dry-run`` predicts.

A row is SHAPE/METHOD, with a shape of ``benchmarks/costs.py`` and an effort of the default method,
or another method. The model is a random LLaMA with a few blocks of that shape, and the peak memory
of a streamed run does not grow with their number::

    python benchmarks/memory.py --rows 7b/fast 70b/wanda --json out/memory.json

Rows are added to the JSON file as soon as they are measured. A row in the file is not measured
again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import known_rows, save
from costs import shaped
from rich.console import Console
from stream import checkpoint

from apt.checkpoints.copies import REPORT
from apt.solver import EFFORTS

ROWS = ["0.5b/fast", "1.5b/default", "7b/fast", "70b/wanda"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The bytes that ``--dry-run`` predicts for a run, and those that it needs."""
    shape, method = name.split("/")
    how = ["--effort" if method in EFFORTS else "--method", method]
    with TemporaryDirectory(prefix="apt-memory-") as folder:
        model, output = checkpoint(Path(folder), shaped(shape)), Path(folder, "out")
        run = [
            "prune", str(model), "--sparsity", "0.5", "--stream", *how, "--json",
            "--samples", str(options.samples), "--seqlen", str(options.seqlen), "-o", str(output),
        ]  # fmt: skip
        predicted = json.loads(apt_prune(*run, "--dry-run"))["needs"]["memory"]
        apt_prune(*run)
        report = json.loads((output / REPORT).read_text())
    return {"row": name, "predicted": predicted, "peak": report["peak_memory_bytes"]["cpu"]}


def apt_prune(*arguments: str) -> str:
    """What a command prints on standard output."""
    command = [sys.executable, "-m", "apt", *arguments]
    return subprocess.check_output(command, text=True)


def main() -> None:
    options = arguments()
    known = {row["row"]: row for row in known_rows(options)}
    for name in options.rows:
        if name not in known:
            known[name] = measured(name, options)
            save(options.json, list(known.values()), options)
        Console().print(known[name])


if __name__ == "__main__":
    main()
