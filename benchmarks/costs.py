"""The time of runs as `apt-prune inspect` predicts it, and as it is.

A row is SHAPE/EFFORT/SAMPLES, with samples of ``--seqlen`` tokens. A shape other than ``smollm2``
is a random LLaMA with a few blocks of that size: the time of a block does not depend on others,
but for the allocation::

    python benchmarks/costs.py --rows smollm2/fast/16 7b/fast/4 --json out/costs.json

The speeds of the machine are measured before each row. Rows are added to the JSON file as soon as
they are measured. A row in the file is not measured again.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import known_rows, open_model, save
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import apt
from apt.checkpoints.opened import Opened
from apt.engine.costs import PlannedRun, measure_machine
from apt.options import PruneRun
from apt.planning.plan import Selection, make_plan, read_pattern

SHAPES = {  # hidden and intermediate size, heads, heads of keys and values, blocks
    "0.5b": (896, 4864, 14, 2, 6),
    "1.5b": (1536, 8960, 12, 2, 3),
    "7b": (4096, 11008, 32, 32, 1),
    "70b": (8192, 28672, 64, 8, 1),
}
ROWS = [
    "smollm2/fast/16", "smollm2/default/16", "0.5b/fast/16", "0.5b/default/16", "1.5b/fast/16",
    "1.5b/default/16", "7b/fast/4", "7b/default/4",
]  # fmt: skip
SOLVING = ("factorisations", "search", "joint solves")
Row = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--pattern", default="0.5")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def opened(shape: str) -> Opened:
    """SmolLM2, or a random model in bf16."""
    model, _ = open_model()
    if shape == "smollm2":
        return model
    config = shaped(shape)
    module = LlamaForCausalLM(config).bfloat16().eval()
    return replace(model, module=module, config=config)


def shaped(shape: str) -> LlamaConfig:
    """A LLaMA with a few blocks of a shape."""
    hidden, intermediate, heads, pairs, blocks = SHAPES[shape]
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
        num_key_value_heads=pairs, num_hidden_layers=blocks, vocab_size=8192,
        dtype=torch.bfloat16, architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def predicted(model: Opened, row: Row, options: argparse.Namespace) -> Row:
    """The seconds by the shapes, and those of them that are spent in solves."""
    pattern = read_pattern(options.pattern)
    plan = make_plan(model.module, model.adapter, pattern, Selection())
    sized = PruneRun(samples=row["samples"], seqlen=options.seqlen)
    run = PlannedRun(model, plan, sized, allocated=True)
    machine = measure_machine("cpu")
    steps = {step: machine.seconds(work) for step, work in run.steps(row["effort"]).items()}
    return {"predicted": sum(steps.values()), "solving": sum(steps[step] for step in SOLVING)}


def run(module: nn.Module, row: Row, options: argparse.Namespace) -> Row:
    """The seconds of a run, and those that it spends in solves."""
    size = (row["samples"], options.seqlen)
    tokens = torch.randint(8192, size, generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    report = apt.prune(
        module, tokens, pattern=options.pattern, adapter="llama",
        options=apt.PruneOptions(effort=row["effort"]), allocation="auto",
    )  # fmt: skip
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "solved": sum(site.seconds for site in report.sites)}


def main() -> None:
    options, console = arguments(), Console()
    known = {row["row"]: row for row in known_rows(options)}
    columns = ["row", "seconds", "predicted", "solved", "solving"]
    table = Table(*columns)
    for name in options.rows:
        if name not in known:
            shape, effort, samples = name.split("/")
            row: Row = {"row": name, "effort": effort, "samples": int(samples)}
            model = opened(shape)
            row |= predicted(model, row, options)
            known[name] = row | run(model.module, row, options)
            save(options.json, list(known.values()), options)
        cells = [known[name][column] for column in columns]
        table.add_row(*(f"{cell:.1f}" if isinstance(cell, float) else cell for cell in cells))
        console.print(table)


if __name__ == "__main__":
    main()
