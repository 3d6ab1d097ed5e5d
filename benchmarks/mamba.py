"""Calibration of state-space models on a CPU with APT's scan and with that of transformers.

Both process the same tokens in the same process, in turn. Three figures are measured: calibration
(a forward of all blocks with capture and Gram matrices), a step of tuning (a forward and a gradient
of all blocks), and the largest tensor of the scan::

    python benchmarks/mamba.py
    python benchmarks/mamba.py --hidden 768 --blocks 2 --seqlen 1024   # the shape of mamba-130m
"""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import open_model, save
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apt.calibration.batches import Batch, OpenBlock, enter
from apt.calibration.capture import Capture
from apt.plugin.registry import registry


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="zoo:mamba")
    parser.add_argument("--hidden", type=int, help="use a random model of this width instead")
    parser.add_argument("--blocks", type=int, default=2, help="number of its blocks")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="print a profile of the forward")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def made(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its adapter."""
    if options.hidden is None:
        model, _ = open_model(options.model)
        return model.module.float(), model.adapter
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(
        hidden_size=options.hidden, num_hidden_layers=options.blocks, vocab_size=2048
    )
    return MambaForCausalLM(config).eval(), registry().adapters.get("mamba").load()()


@torch.no_grad()
def calibrate(model: Any, adapter: Any, batches: list[Batch]) -> None:
    """Run every block with capture, all on the same states."""
    for index, (_, block) in enumerate(adapter.blocks(model)):
        Capture(block, adapter.sites(block)).run(OpenBlock(adapter, block, index, batches))


def tune(model: Any, adapter: Any, batch: Batch) -> None:
    """Compute a forward and a gradient of every block."""
    for index, (_, block) in enumerate(adapter.blocks(model)):
        with torch.enable_grad():
            adapter.step(block, batch.state, batch.calls[index]).square().sum().backward()
        block.zero_grad()


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, records the number of elements of the largest tensor that is created."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def profile(console: Console, name: str, run: Callable[[], None]) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        run()
    shown = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=8)
    console.print(f"{name}\n{shown}", markup=False)


def main() -> None:
    options, console = arguments(), Console(width=160)
    model, adapter = made(options)
    tokens = torch.randint(2048, (options.samples, options.seqlen))
    batches = enter(adapter, model, tokens)
    small = enter(adapter, model, tokens[:2])[0]
    ways = {"transformers": lambda: nullcontext(), "APT": lambda: adapter.running(model)}
    rows: list[dict[str, Any]] = []
    for name, way in ways.items():
        with way(), Largest() as largest:
            calibrate(model, adapter, batches[:1])
        rows.append({"scan": name, "largest": largest.elements, "calibrate": [], "tune": []})
    for _ in range(options.rounds):
        for row, way in zip(rows, ways.values(), strict=True):
            with way():
                row["calibrate"].append(seconds(lambda: calibrate(model, adapter, batches)))
                row["tune"].append(seconds(lambda: tune(model, adapter, small)))
    table = Table("scan", "calibration tokens/s", "of", "tuning tokens/s", "of", "largest tensor")
    first: list[float] = []
    for row in rows:
        for kind, count in (("calibrate", tokens.numel()), ("tune", small.tokens)):
            row[kind] = count / median(row[kind])
        first = first or [row["calibrate"], row["tune"]]
        table.add_row(
            row["scan"],
            f"{row['calibrate']:,.0f}", f"{row['calibrate'] / first[0]:.1f} ×",
            f"{row['tune']:,.0f}", f"{row['tune'] / first[1]:.1f} ×",
            f"{row['largest'] * 4 / 2**20:.1f} MiB",
        )  # fmt: skip
    console.print(table)
    save(options.json, rows)
    if options.profile:
        for name, way in ways.items():
            with way():
                profile(console, name, lambda: calibrate(model, adapter, batches[:1]))


if __name__ == "__main__":
    main()
