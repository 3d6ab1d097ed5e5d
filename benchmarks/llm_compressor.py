"""llm-compressor's SparseGPT and Wanda beside APT, on one model, the same tokens and one machine.

llm-compressor runs in an environment of its own, which is made by pip in ``--work``. The rows take
turns: one process at a time, with the same number of threads. Time is that of the pruning alone;
loading and saving are not counted::

    python benchmarks/llm_compressor.py --patterns 2:4 0.5 --json out/llm_compressor.json
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import FORTUNES, fortunes, open_model, sample, save, wiki
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

import apt
from apt.checkpoints.load import load, open_skeleton
from apt.checkpoints.masks import masks_of, sparsity_of
from apt.checkpoints.opened import Opened
from apt.evaluation.metrics import perplexity
from apt.locations.model_source import find
from apt.plugin.registry import registry

TUNED_ON = 16  # windows of each text, used to choose APT's defaults: not reported
WORKER = Path(__file__).with_name("llm_compressor_worker.py")
OTHERS = {
    "llm-compressor SparseGPT": "SparseGPTModifier",
    "llm-compressor Wanda": "WandaPruningModifier",
}
Row = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patterns", nargs="+", default=["2:4", "0.5"])
    parser.add_argument("--methods", nargs="+", default=["ss", "admm:fast", "admm"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--eval-samples", type=int, default=16)
    parser.add_argument("--fortunes", type=Path, default=FORTUNES)
    parser.add_argument("--work", type=Path, default=Path("out/llm-compressor"))
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def environment(work: Path) -> Path:
    """The interpreter of the environment with llm-compressor."""
    python, installed = work / "venv/bin/python", work / "venv/installed"
    if not installed.is_file():
        subprocess.run([sys.executable, "-m", "venv", work / "venv"], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "llmcompressor"], check=True)
        installed.touch()
    return python


def other(python: Path, work: Path, modifier: str, pattern: str) -> tuple[Opened, float, str]:
    """A model that llm-compressor pruned, the seconds, and its version."""
    output = work / "pruned"
    command = [python, WORKER, work, output, modifier, pattern, str(torch.get_num_threads())]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    told = json.loads(done.stdout.splitlines()[-1])
    loaded = load(open_skeleton(find(str(output), registry()), registry(), packed=True))
    return loaded, told["seconds"], told["version"]


def measured(model: Opened, module: Any, held_out: dict[str, Tensor]) -> Row:
    with model.adapter.running(module):
        scores = {name: perplexity(module, tokens) for name, tokens in held_out.items()}
    return {**scores, "zeros": sparsity_of(masks_of(module, model.adapter))}


def rows(options: argparse.Namespace) -> Any:
    model, tokenizer = open_model()
    calibration, evaluation = wiki()
    tokens = sample(tokenizer, calibration, options.samples, options.seqlen)
    held_out = {
        name: sample(tokenizer, text, options.eval_samples, options.seqlen, TUNED_ON)
        for name, text in (("wiki", evaluation), ("fortunes", fortunes(options.fortunes)))
    }
    options.work.mkdir(parents=True, exist_ok=True)
    python = environment(options.work)
    model.module.save_pretrained(options.work / "dense")
    tokenizer.save_pretrained(options.work / "dense")
    save_file({"tokens": tokens}, options.work / "tokens.safetensors")
    yield {"method": "dense", "pattern": "", **measured(model, model.module, held_out)}
    for pattern in options.patterns:
        for name, modifier in OTHERS.items():
            pruned, seconds, version = other(python, options.work, modifier, pattern)
            yield {
                "method": f"{name} {version}", "pattern": pattern, "seconds": seconds,
                **measured(pruned, pruned.module, held_out),
            }  # fmt: skip
        for method in options.methods:
            name, _, effort = method.partition(":")
            started = time.perf_counter()
            module, _ = apt.prune_copy(
                model.module, tokens, pattern=pattern, method=name, tokenizer=tokenizer,
                adapter=model.spec.name, options=apt.PruneOptions(effort=effort or "default"),
            )  # fmt: skip
            seconds = time.perf_counter() - started
            yield {
                "method": f"APT {method}", "pattern": pattern, "seconds": seconds,
                **measured(model, module, held_out),
            }  # fmt: skip


def main() -> None:
    options, console = arguments(), Console()
    columns = ["wiki", "fortunes", "zeros", "seconds"]
    found, table = [], Table("method", "pattern", *columns)
    for row in rows(options):
        found.append(row)
        shown = [f"{row[key]:.4g}" if key in row else "" for key in columns]
        table.add_row(row["method"], row["pattern"], *shown)
        console.print(*shown, row["method"], row["pattern"])
        save(options.json, found)
    console.print(table)


if __name__ == "__main__":
    main()
