"""Storage and compute: commands on a checkpoint in bf16, on machines with and without native bf16.

Each command is a process of its own, once as the machine is, and once under
``ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2``, with which torch behaves as on a processor
without AVX-512. The same command on a copy of the checkpoint in fp32 is the yardstick::

    python benchmarks/compute.py --json out/compute.json
    python benchmarks/compute.py --before ../former --rows demo,eval

``--before`` also measures the code of another checkout. The models are the embedded LLaMA and
SmolLM2-135M-Instruct, the texts those of ``benchmarks/common.py``. A command of the other checkout
that takes longer than ``--limit`` seconds is stopped.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from common import calibration_file, known_rows, save, smollm2, wiki
from rich.console import Console
from rich.table import Table

MACHINES = {"as it is": {}, "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}}
ROOT = Path(__file__).resolve().parent.parent
_CODE = ("", "adapters", "plugins", "plugins/apt-kernels/src")
Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """A command, with a place for the model, ``{}``, and the entry of its result."""

    words: tuple[str, ...]
    model: str

    def arguments(self, folder: Path, stored: str) -> list[str]:
        """The words of the command line."""
        places = {
            "{}": f"{self.model}-{stored}", "TEXT": "wiki.jsonl", "HELD": "held.txt",
            "OUT": "out", "SPARSE": f"sparse-{stored}",
        }  # fmt: skip
        return [str(folder / places[w]) if w in places else w for w in self.words]


_FEW = ("--samples", "8", "--seqlen", "64")
_WIKI = ("--samples", "8", "--seqlen", "512", "--calibration", "TEXT", "--pattern", "2:4")
_MEASURED = ("--eval", "HELD", "--output", "OUT")
ROWS = {
    "demo": Work(("prune", "{}", "--eval", "builtin", "--output", "OUT"), "llama"),
    "compare": Work(
        ("compare", "{}", "--methods", "wanda,ss", *_FEW, "--windows", "64", "--output", "OUT"),
        "llama",
    ),
    "eval": Work(("eval", "{}", "--data", "HELD", "--samples", "16", "--seqlen", "512"), "smollm2"),
    "recover": Work(
        ("recover", "SPARSE", "--dense", "{}", "--steps", "40", "--samples", "160", "--seqlen",
         "128", "--output", "OUT", "--rate", "2e-4"), "llama",
    ),
    "shrink": Work(
        ("shrink", "{}", "--samples", "16", "--seqlen", "128", *_MEASURED), "llama"
    ),
    "prune fast": Work(("prune", "{}", *_WIKI, "--effort", "fast", *_MEASURED), "smollm2"),
    "prune": Work(("prune", "{}", *_WIKI, *_MEASURED), "smollm2"),
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", help="names separated by commas; all by default")
    parser.add_argument("--machines", default=",".join(MACHINES))
    parser.add_argument("--stored", default="bfloat16,float32")
    parser.add_argument("--before", type=Path, help="a checkout of another commit to measure")
    parser.add_argument(
        "--limit", type=float, default=240.0, help="of a command of the other checkout"
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def environment(machine: str, checkout: Path) -> dict[str, str]:
    """The variables with which a checkout runs as on a machine."""
    places = (str(checkout.resolve() / part) for part in _CODE)
    return {**os.environ, **MACHINES[machine], "PYTHONPATH": os.pathsep.join(places)}


def called(
    words: list[str], env: dict[str, str], limit: float | None = None, place: Path | None = None
) -> Any:
    """Run the command line in a folder, whose code comes first; None if it was stopped."""
    command = [sys.executable, "-m", "apt", *words]
    given: Any = {"env": env, "cwd": place, "timeout": limit, "capture_output": True}
    try:
        return subprocess.run(command, text=True, **given)
    except subprocess.TimeoutExpired:
        return None


def prepare(folder: Path) -> None:
    """The models in bf16 and in fp32, the texts, and a pruned model to recover."""
    calibration_file(folder)
    (folder / "held.txt").write_text("\n\n".join(wiki()[1]), encoding="utf-8")
    env = environment("as it is", ROOT)
    models = {"llama": "zoo:llama", "smollm2": str(smollm2())}
    made = [
        ["convert", place, "--dtype", stored, "-o", str(folder / f"{name}-{stored}")]
        for name, place in models.items()
        for stored in ("bfloat16", "float32")
    ]
    made += [
        ["prune", str(folder / f"llama-{stored}"), "--effort", "fast", *_FEW, "-o",
         str(folder / f"sparse-{stored}")]
        for stored in ("bfloat16", "float32")
    ]  # fmt: skip
    for words in made:
        run = called(words, env, place=ROOT)
        if run.returncode:
            raise SystemExit(run.stderr)


def result(name: str, run: Any, folder: Path) -> Row:
    """The perplexity after the command, its zeros and its peak memory."""
    printed = json.loads(run.stdout)
    if name == "eval":
        return {"perplexity": printed["perplexity"]}
    if name == "compare":
        rows = {row["method"]: row["scores"]["builtin"]["perplexity"] for row in printed["rows"]}
        return {"perplexity": rows.get("ss", next(reversed(rows.values())))}
    report = json.loads((folder / "out/apt_report.json").read_text(encoding="utf-8"))
    part = report["recovery"] if name == "recover" else report
    scores = part["scores"].get("after", {})
    losses = [loss for _, loss in part.get("training", {}).get("held_back", ())]
    return {
        "perplexity": scores.get("perplexity", math.exp(min(losses)) if losses else None),
        "zeros": report["sparsity"],
        "peak": part["peak_memory_bytes"]["cpu"],
    }


def measure(
    options: argparse.Namespace, folder: Path, name: str, machine: str, stored: str, code: str
) -> Row:
    words = [*ROWS[name].arguments(folder, stored), "--json"]
    words += [] if name == "eval" else [] if name == "compare" else ["--overwrite"]
    for left in (*folder.glob("out*"), *folder.glob(".out*")):  # the latter of stopped commands
        shutil.rmtree(left)
    started = time.perf_counter()
    checkout = options.before if code == "before" else ROOT
    limit = options.limit if code == "before" else None
    run = called(words, environment(machine, checkout), limit, checkout)
    row: Row = {
        "command": name, "machine": machine, "stored": stored,
        "seconds": time.perf_counter() - started, "stopped": run is None,
        "code": code,
    }  # fmt: skip
    if run is not None and run.returncode:
        raise SystemExit(f"{' '.join(words)}: {run.stderr}")
    return row if run is None else row | result(name, run, folder)


def main() -> None:
    options, console = arguments(), Console()
    rows = known_rows(options)
    keys = ("command", "machine", "stored", "code")
    known = {tuple(row[key] for key in keys) for row in rows}
    columns = [*keys, "seconds", "perplexity", "zeros", "peak"]
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place))
        names = options.rows.split(",") if options.rows else list(ROWS)
        codes = ["this", *(["before"] if options.before else [])]
        every = product(names, options.machines.split(","), options.stored.split(","), codes)
        for case in every:
            former = case[3] == "before" and case[2] == "float32"  # the yardstick is of this code
            if case not in known and not former:
                rows.append(measure(options, Path(place), *case))
                save(options.json, rows, options)
                console.print(rows[-1])
    table = Table(*columns)
    for row in rows:
        cells = [row.get(key, "") for key in columns]
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells))
    console.print(table)


if __name__ == "__main__":
    main()
