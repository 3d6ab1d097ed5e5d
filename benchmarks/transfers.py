"""Transfers and synchronisations of a pruning run, for each block, with the lines they come from.

An accelerator computes while the CPU goes on, until the CPU asks for a value: a number, the places
of a mask, the success of a factorisation. Each such question is counted, and each copy between two
devices, at the line of APT that asks. On a CPU nothing waits, but the questions are the same::

    python benchmarks/transfers.py --device cuda --efforts fast default --patterns 2:4 0.5

Numbers that `Tensor.tolist` returns are counted on accelerators only, as copies: on a CPU it reads
the memory.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

import apt
from apt.checkpoints.load import load, open_skeleton
from apt.engine.machine import choose_device
from apt.locations.model_source import find
from apt.plugin.registry import registry
from apt.text.sampling import generator

_ROOT = str(Path(apt.__file__).parents[1])
_KINDS = {
    "_local_scalar_dense": "number", "equal": "number",
    "nonzero": "places", "masked_select": "places", "_unique2": "places",
    "_linalg_check_errors": "success", "_linalg_eigh": "success", "_linalg_svd": "success",
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="zoo:llama")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--methods", nargs="+", default=["admm"])
    parser.add_argument("--efforts", nargs="+", default=["fast", "default"])
    parser.add_argument("--patterns", nargs="+", default=["2:4", "0.5"])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=64)
    parser.add_argument("--lines", type=int, default=8, help="lines to print for each run")
    return parser.parse_args()


class Questions(TorchDispatchMode):
    """While entered, counts what makes the CPU wait for a device, by kind and line of APT."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = torch.device(device).type
        self.found = Counter[tuple[str, str]]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if kind := self._kind(func.overloadpacket.__name__, args, result):
            self.found[kind, _line()] += 1
        return result

    def _kind(self, name: str, args: tuple[Any, ...], result: Any) -> str | None:
        """The kind of a question that an operator asks; None if it asks none."""
        if name in ("_to_copy", "copy_"):
            source = args[1 if name == "copy_" else 0]
            kinds = (source.device.type, result.device.type)
            return f"copy {kinds[0]} to {kinds[1]}" if len({*kinds}) > 1 else None
        if name in ("index", "index_put_", "index_put"):
            masks = any(i is not None and i.dtype == torch.bool for i in args[1])
            return "places" if masks and args[0].device.type == self._device else None
        known = _KINDS.get(name)
        return known if known and args[0].device.type == self._device else None


def _line() -> str:
    """The innermost line of this repository that is running, but for this file."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_ROOT) and "site-packages" not in name and name != __file__:
            return f"{name.removeprefix(_ROOT)[1:]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def counted(given: argparse.Namespace, **run: Any) -> tuple[Counter[tuple[str, str]], int]:
    """The questions of a run, and its number of blocks."""
    skeleton = open_skeleton(find(given.model, registry()), registry())
    opened = load(skeleton, torch.float32, given.device)
    shape = (given.samples, given.seqlen)
    tokens = torch.randint(0, opened.module.config.vocab_size, shape, generator=generator(0))
    with Questions(given.device) as questions:
        apt.prune(opened.module, tokens, **run)
    return questions.found, len(opened.adapter.blocks(opened.module))


def main() -> None:
    given, console = arguments(), Console()
    given.device = choose_device(given.device)
    runs = [(m, e, p) for m in given.methods for e in given.efforts for p in given.patterns]
    for method, effort, pattern in runs:
        options = apt.PruneOptions(effort=effort)
        found, blocks = counted(given, method=method, pattern=pattern, options=options)
        table = Table("", "per block", "kind", title=f"{method}, {effort}, {pattern}")
        table.add_row("all", f"{found.total() / blocks:.1f}", "")
        for (kind, line), count in found.most_common(given.lines):
            table.add_row(line, f"{count / blocks:.1f}", kind)
        console.print(table)


if __name__ == "__main__":
    main()
