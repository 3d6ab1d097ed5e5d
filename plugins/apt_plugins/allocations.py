"""Allocations of a sparsity to sites: uniform, or by outliers (OWL, arXiv 2310.05175)."""

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Site
from apt.adapter.eval_mode import eval_mode
from apt.calibration.batches import enter
from apt.planning.allocation import unstructured
from apt.planning.plan import Plan, PlannedBlock
from apt.solver import Unstructured

OUTLIER = 5.0  # M: a score above M times the mean of its block is an outlier
MAX_SHIFT = 0.08  # λ: the largest deviation of a block's sparsity, before centring


def uniform(model: nn.Module, adapter: Adapter, plan: Plan, tokens: Tensor) -> dict[str, float]:
    """The sparsities of the plan, unchanged."""
    patterns = {site.name: site.pattern for site in unstructured(plan)}
    return {n: p.sparsity for n, p in patterns.items() if isinstance(p, Unstructured)}


@torch.no_grad()
def owl(model: nn.Module, adapter: Adapter, plan: Plan, tokens: Tensor) -> dict[str, float]:
    """A lower sparsity for blocks with more outliers among their scores ``|w| ‖x‖``.

    A block's sparsity is the planned one plus a shift of at most `MAX_SHIFT`. The shift falls
    linearly with the share of scores above `OUTLIER` times their mean. The shifts are then centred:
    their mean, weighted by the size of the blocks, is 0.
    """
    shares = uniform(model, adapter, plan, tokens)
    outliers = _outliers(model, adapter, plan, tokens)
    low, high = min(outliers), max(outliers)
    shifts = [
        MAX_SHIFT * (1 - 2 * (x - low) / (high - low)) if high > low else 0.0 for x in outliers
    ]
    sizes = [sum(s.size for s in block.sites if s.name in shares) for block in plan.blocks]
    mean = sum(s * n for s, n in zip(shifts, sizes, strict=True)) / sum(sizes)
    for block, shift in zip(plan.blocks, shifts, strict=True):
        for site in block.sites:
            if site.name in shares:
                shares[site.name] += shift - mean
    return shares


def _outliers(model: nn.Module, adapter: Adapter, plan: Plan, tokens: Tensor) -> list[float]:
    """The share of outliers among the scores of each block."""
    modules = dict(adapter.blocks(model))
    found = []
    with eval_mode(model), adapter.running(model):
        batches = enter(adapter, model, tokens)
        for index, planned in enumerate(plan.blocks):
            block, squares = modules[planned.name], _Squares()
            with adapter.capture(block, [entry.site for entry in planned.sites], squares.add):
                for batch in batches:
                    batch.state = adapter.step(block, batch.state, batch.calls[index])
            found.append(_share(block, planned, squares.sums))
    return found


class _Squares:
    """The sums of squares of every site's inputs (in,)."""

    def __init__(self) -> None:
        self.sums: dict[Site, Tensor] = {}

    def add(self, site: Site, inputs: Tensor) -> None:
        """Add inputs (..., in)."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self.sums[site] = self.sums.get(site, 0) + rows.square().sum(0)


def _share(block: nn.Module, planned: PlannedBlock, sums: dict[Site, Tensor]) -> float:
    scores = torch.cat(
        [
            (site.oriented(site.weight(block)).float().abs() * sums[site].sqrt()).flatten()
            for site in (entry.site for entry in planned.sites)
            if site in sums
        ]
    )
    return float((scores > OUTLIER * scores.mean()).float().mean())
