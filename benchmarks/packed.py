"""Packed models beside dense ones: tokens per second, bytes, and products of single matrices.

The model is SmolLM2, or a random one of another shape: zeros cost the same wherever they are, so it
is pruned by magnitude. ``apt-prune bench`` measures dense and packed models in turns::

    python benchmarks/packed.py --shape 1.5b --patterns 0.5 0.7 2:4 --json out/packed.json

``--matrices`` measures products of one vector with matrices that are together larger than the
cache: torch's dense product in bf16 and in int8, the packed ones, and a packed matrix without
zeros, which shows what the kernels reach with dense matrices.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import open_model, save
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from apt.packing.directory import Rounding, pack
from apt.runtime.linear import PackedLinear, kernels
from apt.runtime.matrix import SCALES, VALUES, Entry, encode
from apt.solver import lowest, parse_pattern

SHAPES = {
    "135m": {  # that of SmolLM2
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "1.5b": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
GROUP = 128
Row = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[*SHAPES], help="of a random model; SmolLM2 without it")
    parser.add_argument("--patterns", nargs="+", default=["0.5", "0.6", "0.7", "2:4"])
    parser.add_argument("--kinds", nargs="+", default=["bfloat16", "int8"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--generate", type=int, default=32)
    parser.add_argument("--matrices", action="store_true", help="products of single matrices")
    parser.add_argument("--work", type=Path, default=Path("out/packed"))
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def dense_model(options: argparse.Namespace) -> Any:
    if not options.shape:
        return open_model()[0].module.bfloat16()
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[options.shape]))
    model = model.to_empty(device="cpu").bfloat16()
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02, generator=draw)
    model.tie_weights()
    return model


def linears(model: Any) -> dict[str, torch.nn.Linear]:
    """The Linears of the blocks, by the names of their weights."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    }


def models(options: argparse.Namespace) -> list[Row]:
    """Dense and packed models, measured in turns by ``apt-prune bench``."""
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    model = dense_model(options)
    model.config.dtype = "bfloat16"
    folders = [options.work / "dense"]
    model.save_pretrained(folders[0])
    pruned_ones = linears(model)
    dense = {name: module.weight.data for name, module in pruned_ones.items()}
    for pattern in options.patterns:
        for name, module in pruned_ones.items():
            module.weight.data = dense[name].masked_fill(removed(dense[name], pattern), 0)
        pruned = options.work / "pruned"
        model.save_pretrained(pruned)
        for kind in options.kinds:
            folders.append(options.work / f"{pattern.replace(':', 'of')}-{kind}")
            folders[-1].mkdir()
            rounding = None if kind == "bfloat16" else Rounding(kind, GROUP)
            pack(pruned, dict.fromkeys(pruned_ones, rounding), folders[-1])
        shutil.rmtree(pruned)
    command = [
        Path(sys.executable).with_name("apt-prune"), "bench", *folders, "--json", "--batch", "1",
        "--prompt", options.prompt, "--generate", options.generate, "--rounds", options.rounds,
        "--threads", options.threads,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
    return [speeds_of(model) for model in json.loads(done.stdout)["models"]]


def speeds_of(model: Row) -> Row:
    """Tokens per second, their ratios to the dense model, and the bytes of a model."""
    decode, prefill = (
        model["speeds"][0][f"{name}_tokens_per_second"] for name in ("decode", "prefill")
    )
    return {
        "model": Path(model["model"]).name,
        "bytes": model["weight_bytes"],
        "peak": model["peak_memory_bytes"]["cpu"],
        "decode": decode["median"],
        "decode ratio": decode["ratio"],
        "prefill": prefill["median"],
        "prefill ratio": prefill["ratio"],
    }


def removed(weight: torch.Tensor, pattern: str) -> torch.Tensor:
    """The mask of the smallest weights."""
    if pattern == "0":
        return torch.zeros_like(weight, dtype=torch.bool)
    return lowest(weight.float().abs(), parse_pattern(pattern))


def packed(weight: torch.Tensor, removed: torch.Tensor, kind: str) -> PackedLinear:
    """A module with random integers or with the values of the matrix."""
    entry, parts = encode(weight.masked_fill(removed, 0))
    if kind != "bfloat16":
        count = entry.kept if kind == "int8" else -(-entry.kept // 2)
        parts[VALUES] = torch.randint(0, 127, (count,)).to(
            torch.int8 if kind == "int8" else torch.uint8
        )
        parts[SCALES] = torch.rand(len(weight), -(-weight.shape[1] // GROUP)).bfloat16()
        entry = Entry(
            entry.shape, entry.dtype, entry.kept, entry.mask, kind, entry.stored, GROUP
        )  # fmt: skip
    module = PackedLinear(entry, bias=False)
    module.load_state_dict({f"weight_{name}": part for name, part in parts.items()})
    module.prepare()
    return module


def matrices(options: argparse.Namespace, side: int = 4096, count: int = 4) -> list[Row]:
    """Milliseconds of a product with one vector: medians over interleaved rounds, and spread."""
    torch.set_num_threads(options.threads)
    x = torch.randn(1, side).bfloat16()
    weights = [torch.randn(side, side).bfloat16() for _ in range(count)]
    whole = [torch.randint(-127, 127, (side, side)).to(torch.int8) for _ in range(count)]
    scales = torch.rand(side).bfloat16()
    runs: dict[str, list[Callable[[], Any]]] = {
        "dense bfloat16 (torch)": [lambda w=w: torch.nn.functional.linear(x, w) for w in weights],
        "dense int8 (torch)": [
            lambda w=w: torch._weight_int8pack_mm(x, w, scales) for w in whole
        ],
    }  # fmt: skip
    if native := kernels():
        own = [native.DenseMatrix(w) for w in weights]
        runs["dense bfloat16 (apt-kernels)"] = [lambda m=m: m.product(x).to(x.dtype) for m in own]
    for pattern in ("0", *options.patterns):
        found = [removed(w, pattern) for w in weights]
        for kind in ("bfloat16", "int8", "int4"):
            modules = [packed(w, m, kind) for w, m in zip(weights, found, strict=True)]
            runs[f"packed {pattern} {kind}"] = [lambda m=m: m(x) for m in modules]
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for turn in range(options.rounds * 5 + 1):
            for name, calls in runs.items():
                started = time.perf_counter()
                for call in calls:
                    call()
                if turn:
                    times[name].append((time.perf_counter() - started) / count * 1e3)
    base = statistics.median(times["dense bfloat16 (torch)"])
    return [
        {"run": name, "ms": statistics.median(t), "least": min(t), "most": max(t),
         "ratio": base / statistics.median(t)}
        for name, t in times.items()
    ]  # fmt: skip


def main() -> None:
    options = arguments()
    rows = matrices(options) if options.matrices else models(options)
    save(options.json, rows)
    columns = list(rows[0])
    table = Table(*columns)
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
