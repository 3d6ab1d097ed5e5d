"""Packed directories that decode at a given speed: speeds, perplexities and levels.

Each goal is fitted with zeros and bits, and with each of them alone, from one table of losses.
With ``--alone``, models of one means at one level everywhere are made and measured too; a model of
smaller matrices runs in the packed runtime with its dense weights. Other packed directories are
measured in the same way. All speeds are measured once more at the end,
in turn: the median step of decoding after 512 tokens, with one thread in the time that the thread
was running. The middle one of three speeds counts, and the row has all three::

    python benchmarks/fit_speed.py SmolLM2.gguf --dtype bfloat16 --samples 16 --seqlen 512 \\
        --effort fast --calibration wiki.jsonl --eval held-out.jsonl --goals 42 --alone
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from common import sample, save
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

import apt.runtime
from apt.checkpoints.load import load_tokenizer, open_skeleton
from apt.checkpoints.opened import Opened
from apt.engine.pace import step_seconds
from apt.evaluation.metrics import perplexity
from apt.locations.model_source import find
from apt.output.report import read_report
from apt.plugin.registry import registry
from apt.runtime.decoding import decode_by_kernels
from apt.runtime.dense import use_kernels
from apt.runtime.entries import SINGLE_PACKED
from apt.text.datasets import documents

MEANS = ("zeros,bits", "bits", "zeros")
ALONE: dict[str, tuple[Any, ...]] = {
    "dense": ("convert",),
    "int8": ("prune", "--sparsity", 0, "--quantize", "int8"),
    "int4": ("prune", "--sparsity", 0, "--quantize", "int4"),
    "50-zeros": ("prune", "--sparsity", 0.5),
    "60-zeros": ("prune", "--sparsity", 0.6),
    "keep-60": ("shrink", "--keep", 0.6),
}
"""The commands that make a model by one means."""
ROUNDS = 3
Row = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--goals", nargs="*", type=float, default=[])
    parser.add_argument("--means", nargs="+", default=MEANS)
    parser.add_argument("--alone", action="store_true", help="measure one means alone")
    parser.add_argument("--others", nargs="*", type=Path, default=[])
    parser.add_argument("--eval", dest="evaluation", default="builtin")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--effort", default="default")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--work", type=Path, default=Path("out/fit-speed"))
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def fitted(goal: float, means: str, options: argparse.Namespace) -> Path | None:
    """The directory of a speed; the first one has the table of losses for all others.

    None if these means do not reach the speed.
    """
    first = options.work / f"{options.goals[0]:g}-{MEANS[0]}"
    path: Path = options.work / f"{goal:g}-{means}"
    words = [
        "fit", options.model, "--speed", goal, "--may", means, "--output", path,
        "--calibration", options.calibration, "--samples", options.samples,
        "--seqlen", options.seqlen, "--dtype", options.dtype, "--effort", options.effort,
        *(["--from", first] if path != first else []),
    ]  # fmt: skip
    if path.is_dir():
        return path
    done = subprocess.run([sys.executable, "-m", "apt", *map(str, words)])
    if done.returncode == 2:  # never so fast with these means
        return None
    done.check_returncode()
    return path


def made_alone(name: str, options: argparse.Namespace) -> Path:
    """A model by one means, packed if that makes it smaller."""
    command, *words = ALONE[name]
    plain, packed = options.work / f"{name}-plain", options.work / name
    if not plain.is_dir():
        given = [] if command == "convert" else [
            "--calibration", options.calibration, "--samples", options.samples,
            "--seqlen", options.seqlen, "--effort", options.effort,
        ]  # fmt: skip
        call(command, options.model, *words, *given, "--dtype", options.dtype, "--output", plain)
    if command != "prune":
        return plain
    if not packed.is_dir():
        call("pack", plain, "--output", packed)
    return packed


def call(*words: Any) -> None:
    """Run a command of APT."""
    subprocess.run([sys.executable, "-m", "apt", *map(str, words)], check=True)


def opened(path: Path) -> Any:
    """The model of a directory in the packed runtime."""
    if (path / SINGLE_PACKED).is_file():
        return apt.runtime.load(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    use_kernels(model)
    decode_by_kernels(model)
    return model


def speeds(paths: list[Path], skeleton: Opened) -> dict[Path, list[float]]:
    """Tokens per second of packed directories, measured in turn."""
    found: dict[Path, list[float]] = {path: [] for path in paths}
    for _ in range(ROUNDS):
        for path in paths:
            found[path].append(1 / step_seconds(opened(path), skeleton))
    return found


def row_of(path: Path, measured: list[float], tokens: Tensor) -> Row:
    """The row of a directory."""
    record = read_report(path)
    fit = {} if record is None else record.get("fit", {})
    return {
        "model": path.name,
        "bytes": sum(file.stat().st_size for file in path.glob("*.safetensors")),
        "speed": statistics.median(measured),
        "speeds": measured,
        "perplexity": perplexity(opened(path), tokens),
        "fit": fit.get("speed"),
        "predicted": fit.get("loss"),
        "levels": dict(Counter(fit.get("levels", {}).values()).most_common()),
    }


def show(rows: list[Row]) -> None:
    table = Table("model", "MiB", "tokens/s", "perplexity", "goal", "in the run", "levels")
    for row in rows:
        fit, speed = row["fit"] or {}, f"{row['speed']:.1f}"
        levels = ", ".join(f"{count} × {level}" for level, count in row["levels"].items())
        table.add_row(
            row["model"], f"{row['bytes'] / 2**20:.1f}", speed, f"{row['perplexity']:.3f}",
            str(fit.get("goal", "")), f"{fit.get('measured', 0):.1f}", levels,
        )  # fmt: skip
    Console().print(table)


def main() -> None:
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    made = [fitted(goal, means, options) for goal in options.goals for means in options.means]
    alone = [made_alone(name, options) for name in ALONE] if options.alone else []
    paths = [path for path in (*made, *alone, *options.others) if path is not None]
    source = find(options.model, registry())
    texts = list(documents(options.evaluation, "evaluation", registry()))
    tokens = sample(load_tokenizer(source), texts, options.windows, options.seqlen)
    found = speeds(paths, open_skeleton(source, registry(), expanded=True))
    rows = [row_of(path, found[path], tokens) for path in paths]
    save(options.json, rows, options)
    print(json.dumps(rows))
    show(rows)


if __name__ == "__main__":
    main()
