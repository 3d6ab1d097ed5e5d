"""The time and the peak memory of streamed runs.

Each run is a separate process. With a model, the runs are in memory, streamed, and streamed with
activations on disk, in turn. With ``--blocks``, they are streamed runs of random checkpoints of
LLaMA with these numbers of blocks::

    python benchmarks/stream.py ./smollm2 --rounds 2
    python benchmarks/stream.py --blocks 2 4 8 16 32 --hidden 1024
    python benchmarks/stream.py --blocks 2 32 --hidden 4096 --intermediate 11008 \\
        --vocabulary 32000 --samples 2 --seqlen 64 --method wanda        # LLaMA 7B's shape
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import save
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from apt.checkpoints.copies import REPORT
from apt.plugin.registry import registry

MODES = {
    "in memory": (),
    "streamed": ("--stream",),
    "activations on disk": ("--stream", "--activations", "disk"),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a directory to prune in memory and streamed")
    parser.add_argument("--blocks", type=int, nargs="*", default=[])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, help="11/4 of the hidden size by default")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--method", default="admm")
    parser.add_argument("--effort", default="default")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def configuration(blocks: int, options: argparse.Namespace) -> LlamaConfig:
    """A LLaMA with as many blocks, of the widths in the options."""
    hidden = options.hidden
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=options.intermediate or hidden * 11 // 4,
        num_hidden_layers=blocks, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64, vocab_size=options.vocabulary, dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def checkpoint(folder: Path, config: LlamaConfig) -> Path:
    """Write a random LLaMA in bf16, with one file for each block."""
    target = folder / "llama"
    config.save_pretrained(target)
    zoo = registry().adapters.get("llama").zoo_path()
    AutoTokenizer.from_pretrained(zoo).save_pretrained(target)
    with torch.device("meta"):
        shapes = LlamaForCausalLM(config).state_dict()
    draw, files = torch.Generator().manual_seed(0), defaultdict(dict)
    for name, tensor in shapes.items():
        files["-".join(name.split(".")[1:3]) if ".layers." in name else "rest"][name] = tensor.shape
    for file, group in files.items():
        weights = {name: _random(shape, draw) for name, shape in group.items()}
        save_file(weights, target / f"{file}.safetensors", {"format": "pt"})
    weight_map = {name: f"{file}.safetensors" for file, group in files.items() for name in group}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (target / "model.safetensors.index.json").write_text(index)
    return target


def _random(shape: torch.Size, draw: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=draw)


def run(model: Path, output: Path, options: argparse.Namespace, *more: str) -> dict[str, Any]:
    """The seconds and the peak resident memory of one ``apt-prune prune``."""
    command = [
        sys.executable, "-m", "apt", "prune", str(model), "--pattern", "2:4", "-o", str(output),
        "--samples", str(options.samples), "--seqlen", str(options.seqlen),
        "--method", options.method, *more,
    ]  # fmt: skip
    if options.method == "admm":
        command += ["--effort", options.effort]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed")
    seconds = time.perf_counter() - started
    report = json.loads((output / REPORT).read_text())
    shutil.rmtree(output)
    return {"seconds": seconds, "peak": report["peak_memory_bytes"]["cpu"]}


def main() -> None:
    options, console = arguments(), Console()
    folder, rows = Path(tempfile.mkdtemp(prefix="apt-stream-")), []
    table = Table("model", "run", "seconds", "peak memory", "weights")
    if options.model:
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in MODES}
        for _ in range(options.rounds):
            for name, found in runs.items():
                found.append(run(Path(options.model), folder / "out", options, *MODES[name]))
        for name, found in runs.items():
            seconds, peak = (median(one[key] for one in found) for key in ("seconds", "peak"))
            rows.append({"model": options.model, "run": name, "seconds": seconds, "peak": peak})
    for blocks in options.blocks:
        model = checkpoint(folder, configuration(blocks, options))
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        row = {"model": f"{blocks} blocks", "run": "streamed", "weights": size}
        rows.append({**row, **run(model, folder / "out", options, "--stream")})
        console.print(rows[-1])
        shutil.rmtree(model)
    for row in rows:
        weights = f"{row['weights'] / 2**20:,.0f} MiB" if "weights" in row else ""
        peak = f"{row['peak'] / 2**20:,.0f} MiB"
        table.add_row(row["model"], row["run"], f"{row['seconds']:.1f}", peak, weights)
    console.print(table)
    save(options.json, rows)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
