"""The time of whole runs, compared with a lower bound of their mode, in one process.

The bound is the time of the necessary operations of a mode on the given samples. Layer-wise, these
are two forwards of the samples through the blocks and one Gram product for each distinct input.
Error-aware, they are three forwards, the Gram products, and one cross product for each input. A run
of default effort does more: it generates text, tunes the blocks, and trains the norms at the end::

    python benchmarks/endtoend.py --samples 32 --seqlen 512 --json out/endtoend.json

``--scaling`` measures the growth of the time with the number of tokens and of blocks instead.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import open_model, sample, save, wiki
from rich.console import Console
from torch import Tensor, nn

from apt import prune_copy
from apt.adapter import Site
from apt.calibration.batches import enter
from apt.checkpoints.opened import Opened
from apt.options import PRESETS, PruneOptions
from apt.output.report import peak_memory
from apt.solver import Gram

MODES = {"layer-wise": False, "error-aware": True}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model reference; SmolLM2 by default")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--efforts", nargs="+", default=["fast", "default"])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--blocks", type=int, help="cut the model to its first blocks")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


@torch.no_grad()
def limit(model: Opened, module: nn.Module, tokens: Tensor) -> dict[str, float]:
    """Seconds of one forward of all blocks, of all Gram products and of all cross products."""
    adapter, batches = model.adapter, enter(model.adapter, module, tokens)
    spent = {"forward": 0.0, "gram": 0.0, "cross": 0.0}
    for index, (_, block) in enumerate(adapter.blocks(module)):
        grams: dict[str, tuple[Gram, Tensor]] = {}
        for batch in batches:
            inputs: dict[str, Tensor] = {}

            def keep(site: Site, x: Tensor, inputs: dict[str, Tensor] = inputs) -> None:
                inputs[site.input] = x

            with adapter.capture(block, adapter.sites(block), keep):
                adapter.step(block, batch.state, batch.calls[index])
            started = time.perf_counter()
            batch.state = adapter.step(block, batch.state, batch.calls[index])
            spent["forward"] += time.perf_counter() - started
            for name, x in inputs.items():
                rows = x.reshape(-1, x.shape[-1]).float()
                width = rows.shape[1]
                gram, cross = grams.setdefault(name, (Gram(width), torch.zeros(width, width)))
                started = time.perf_counter()
                gram.add(rows)
                spent["gram"] += time.perf_counter() - started
                started = time.perf_counter()
                cross.addmm_(rows.T, rows)
                spent["cross"] += time.perf_counter() - started
    return spent


def run(
    model: Opened, tokens: Tensor, others: Tensor | None, pattern: str, effort: str, aware: bool
) -> tuple[float, float]:
    """The seconds of a whole run, and of its solves. Without ``others`` no norms are trained."""
    options = PruneOptions(effort=effort, error_aware=aware)  # type: ignore[arg-type]
    started = time.perf_counter()
    _, report = prune_copy(
        model.module, tokens, pattern=pattern, adapter=model.spec.name, options=options,
        other_tokens=others,
    )  # fmt: skip
    return time.perf_counter() - started, sum(site.seconds for site in report.sites)


def texts(options: argparse.Namespace, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """The calibration samples, and as many other windows (samples, seqlen)."""
    both = sample(tokenizer, wiki()[0], 2 * options.samples, options.seqlen)
    return both[: options.samples], both[options.samples :]


def against_limit(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each mode and effort."""
    model, tokenizer = open_model(options.model)
    with cut(model, options.blocks):
        yield from _against_limit(options, model, *texts(options, tokenizer))


def _against_limit(
    options: argparse.Namespace, model: Opened, tokens: Tensor, others: Tensor
) -> Iterator[dict[str, Any]]:
    parts = limit(model, model.module, tokens)
    limits = {
        False: 2 * parts["forward"] + parts["gram"],
        True: 3 * parts["forward"] + parts["gram"] + parts["cross"],
    }
    yield {"tokens": tokens.numel(), **parts}
    for mode in options.modes:
        aware = MODES[mode]
        for effort, norms in itertools.product(options.efforts, (False, True)):
            if norms and not (aware and PRESETS[effort].norm_epochs):
                continue
            text = others if norms else None
            seconds, solve = run(model, tokens, text, options.pattern, effort, aware)
            yield {
                "mode": mode,
                "effort": effort,
                "norms": norms,
                "seconds": seconds,
                "solve": solve,
                "limit": limits[aware],
                "ratio": seconds / limits[aware],
                "peak_gib": peak_memory()["cpu"] / 2**30,
            }


def scaling(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The seconds of default runs with 1, 2 and 4 times as many blocks, then as many tokens."""
    model, tokenizer = open_model(options.model)
    tokens, others = texts(options, tokenizer)
    names = model.adapter.blocks(model.module)
    for blocks in (len(names) // 4, len(names) // 2, len(names)):
        yield _scaled(model, tokens, others, options.samples // 4, blocks, options.pattern)
    for share in (2, 1):
        count = options.samples // share
        yield _scaled(model, tokens, others, count, len(names) // 4, options.pattern)


@contextmanager
def cut(model: Opened, blocks: int | None) -> Iterator[None]:
    """While entered, the model has only its first blocks."""
    path, _, _ = model.adapter.blocks(model.module)[0][0].rpartition(".")
    whole = model.module.get_submodule(path)
    parent, _, leaf = path.rpartition(".")
    setattr(model.module.get_submodule(parent), leaf, whole[:blocks])
    try:
        yield
    finally:
        setattr(model.module.get_submodule(parent), leaf, whole)


def _scaled(
    model: Opened, tokens: Tensor, others: Tensor, samples: int, blocks: int, pattern: str
) -> dict[str, Any]:
    """A run with the first samples of the model cut to its first blocks."""
    tokens, others = tokens[:samples], others[:samples]
    with cut(model, blocks):
        seconds, solve = run(model, tokens, others, pattern, "default", True)
    return {
        "blocks": blocks,
        "tokens": tokens.numel(),
        "seconds": seconds,
        "solve": solve,
        "rest_per_block_and_1000_tokens": (seconds - solve) / blocks / tokens.numel() * 1000,
        "solve_per_block": solve / blocks,
    }


def main() -> None:
    options, console, rows = arguments(), Console(), []
    for row in scaling(options) if options.scaling else against_limit(options):
        rows.append(row)
        console.print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    save(options.json, rows)


if __name__ == "__main__":
    main()
