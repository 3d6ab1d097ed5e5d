"""Perplexity of Mamba after pruning only parameters other than Linears.

It is compared with the same sparsity by magnitude and, for ``A_log``, by the score of SparseSSM
(arXiv 2506.09613): ``A_log²`` times the squares of the states, summed over samples. ``count``
counts for each entry the time steps in which it is among the lowest; ``sum`` adds all steps::

    python benchmarks/extras.py zoo:mamba --kinds A_log conv1d D
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from apt_adapters import scan
from common import open_model, sample
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers.models.mamba import modeling_mamba

from apt.adapter import Extra
from apt.calibration.batches import Batch, enter
from apt.checkpoints.opened import Opened
from apt.evaluation.metrics import perplexity
from apt.planning.plan import make_plan
from apt.plugin.registry import registry
from apt.pruning.block_store import BlockStore
from apt.pruning.layer import BlockPruning, Recipe
from apt.pruning.pipeline import prune_blocks
from apt.solver import parse_pattern, sm
from apt.text.datasets import documents


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="zoo:mamba")
    parser.add_argument("--kinds", nargs="+", default=["A_log", "conv1d", "D"])
    parser.add_argument("--sparsities", nargs="+", default=["0.5", "0.7"])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    return parser.parse_args()


def ours(model: Opened, module: nn.Module, kind: str, sparsity: str, tokens: Tensor) -> None:
    """Prune as ``apt-prune prune --also`` does, with every site left dense."""
    plan = make_plan(module, model.adapter, parse_pattern(sparsity), also=[kind])
    dense = [
        replace(block, sites=tuple(replace(site, pattern=None) for site in block.sites))
        for block in plan.blocks
    ]
    plan = replace(plan, blocks=tuple(dense))
    prune_blocks(BlockStore(module), BlockPruning(model.adapter, plan, sm, Recipe()), tokens)


def by_score(
    model: Opened,
    module: nn.Module,
    kind: str,
    sparsity: str,
    tokens: Tensor,
    score: Callable[[Tensor, int, list[Tensor]], Tensor],
) -> None:
    """Set the entries of lowest ``score`` to zero, block by block."""
    with torch.no_grad(), model.adapter.running(module):
        batches = enter(model.adapter, module, tokens)
        for index, (_, block) in enumerate(model.adapter.blocks(module)):
            extra = next(e for e in model.adapter.extras(block) if e.kind == kind)
            prune_block(model, block, index, batches, extra, sparsity, score)


def prune_block(
    model: Opened,
    block: nn.Module,
    index: int,
    batches: list[Batch],
    extra: Extra,
    sparsity: str,
    score: Callable[[Tensor, int, list[Tensor]], Tensor],
) -> None:
    with recorded_states() as states:
        for batch in batches:
            model.adapter.step(block, batch.state, batch.calls[index])
    weight = extra.weight(block).data
    count = int(float(sparsity) * weight.numel() + 0.5)
    lowest = score(weight.float(), count, states).flatten().topk(count, largest=False).indices
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[lowest] = True
    weight.masked_fill_(mask.view_as(weight), 0)
    for batch in batches:
        batch.state = model.adapter.step(block, batch.state, batch.calls[index])


@contextmanager
def recorded_states() -> Iterator[list[Tensor]]:
    """While entered, record the states before each step, squared and summed over samples.

    The list has a tensor (L, D, N) for each batch.
    """
    seen: list[Tensor] = []
    before = getattr(modeling_mamba, "mamba_selective_scan", None)

    def watched(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: Any) -> Any:
        step = F.softplus(dt.float() + rest["delta_bias"][:, None])
        given = (y.float().permute(2, 0, 1).contiguous() for y in (step, step * x.float(), B))
        states, _ = scan._states(x.new_zeros(len(x), *A.t().shape).float(), *_order(*given, A))
        shifted = torch.cat([torch.zeros_like(states[:1]), states[:-1]])
        seen.append(shifted.square().sum(1).transpose(1, 2))
        return scan.selective_scan(x, dt, A, B, C, **rest)

    modeling_mamba.mamba_selective_scan = watched
    try:
        yield seen
    finally:
        modeling_mamba.mamba_selective_scan = before


def _order(step: Tensor, drive: Tensor, b: Tensor, A: Tensor) -> tuple[Tensor, ...]:
    return step, drive, A.float().t().contiguous(), b


def magnitude(weight: Tensor, count: int, states: list[Tensor]) -> Tensor:
    return weight.abs()


def summed(weight: Tensor, count: int, states: list[Tensor]) -> Tensor:
    return weight.square() * torch.stack(states).sum((0, 1))


def counted(weight: Tensor, count: int, states: list[Tensor]) -> Tensor:
    by_step = (weight.square() * torch.stack(states).sum(0)).flatten(1)
    lowest = by_step.topk(count, largest=False).indices.flatten()
    return -torch.zeros(weight.numel()).scatter_add_(0, lowest, torch.ones(len(lowest)))


def main() -> None:
    options, console = arguments(), Console()
    model, tokenizer = open_model(options.model)
    tokens, held_out = (
        sample(
            tokenizer,
            list(documents("builtin", split, registry())),
            options.samples,
            options.seqlen,
        )
        for split in ("calibration", "evaluation")
    )
    with model.adapter.running(model.module):
        dense = perplexity(model.module, held_out)
    table = Table("pruned", "ours", "magnitude", "SparseSSM, sum", "SparseSSM, count")
    table.add_row("dense", f"{dense:.2f}")
    for kind in options.kinds:
        for sparsity in options.sparsities:
            scores: list[Any] = [magnitude]
            if kind == "A_log" and model.config.model_type == "mamba":
                scores += [summed, counted]
            cells = []
            for score in (None, *scores):
                module = copy.deepcopy(model.module)
                if score is None:
                    ours(model, module, kind, sparsity, tokens)
                else:
                    by_score(model, module, kind, sparsity, tokens, score)
                with model.adapter.running(module):
                    cells.append(f"{perplexity(module, held_out):.2f}")
            table.add_row(f"{kind} {sparsity}", *cells)
    console.print(table)


if __name__ == "__main__":
    main()
