"""Local reconstruction: a pruned block's kept weights, tuned towards what the dense block gives.

What a closed form cannot see is what the block does between its weights. So, as EBFT does (arXiv
2402.12419), the kept weights of a block are tuned by gradient, masks fixed, towards the output
that the dense block gives on the dense stream. On little calibration text that overfits (arXiv
2406.15524): a part of the batches is held back, the weights that do best on it are taken, and where
none does better than the start, the start stays.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from apt.adapter import Adapter, Site, State
from apt.batches import Batch


@dataclass(frozen=True)
class Reconstruction:
    """How a block is tuned.

    Args:
        rate: the first learning rate of Adam, as a share of each weight's root mean square; it
            falls to zero along a cosine.
        epochs: how often the batches are passed, at most.
        held_back: the share of the batches that is held back, at least one.
        tokens_per_batch: about as many tokens make a step.
    """

    rate: float = 5e-3
    epochs: int = 8
    held_back: float = 0.125
    tokens_per_batch: int = 1024


@dataclass(frozen=True)
class Tuned:
    """The error of a block's output on the batches held back, before and after tuning.

    The error is the mean over tokens of ``‖h − h_dense‖² / ‖h_dense‖²``.
    """

    before: float
    after: float


class _Step(nn.Module):
    """One step through a block as a module, so that its weights can be substituted."""

    def __init__(self, adapter: Adapter, block: nn.Module, index: int) -> None:
        super().__init__()
        self.block = block
        self._adapter, self._index = adapter, index

    def forward(self, batch: Batch) -> State:
        """The residual stream after the block."""
        state = self._adapter.step(self.block, batch.state, batch.calls[self._index])
        return self._adapter.residual(state)

    def error(self, weights: dict[str, Tensor], batch: Batch) -> Tensor:
        """See `Tuned`."""
        assert batch.reference is not None
        dense = self._adapter.residual(batch.reference.state).float()
        given = functional_call(self, weights, (batch,)).float()
        error: Tensor = ((given - dense).square().sum(-1) / dense.square().sum(-1)).mean()
        return error


def reconstruct(
    adapter: Adapter,
    block: nn.Module,
    index: int,
    batches: list[Batch],
    sites: Sequence[Site],
    options: Reconstruction,
) -> Tuned | None:
    """Tune the kept weights of ``sites`` in place.

    Args:
        adapter: the block's adapter.
        block: the pruned block.
        index: its place among the blocks.
        batches: the states before the block, and in their references those after the dense one.
        sites: the sites to tune.
        options: how.

    Returns:
        The errors before and after; None where there are too few batches to hold one back.
    """
    held = max(1, round(options.held_back * len(batches)))
    if len(batches) <= held:
        return None
    step = _Step(adapter, block, index)
    parameters = [site.weight(block) for site in sites]
    names = [f"block.{site.parameter}" for site in sites]
    masters = [p.detach().float().clone().requires_grad_() for p in parameters]
    masks = [(p != 0).float() for p in masters]

    def weights() -> dict[str, Tensor]:
        return {
            name: master.to(p.dtype)
            for name, master, p in zip(names, masters, parameters, strict=True)
        }

    def held_back() -> float:
        with torch.no_grad():
            return sum(float(step.error(weights(), b)) for b in batches[-held:]) / held

    rates = [options.rate * float(m.detach()[m != 0].square().mean().sqrt()) for m in masters]
    adam = torch.optim.Adam(
        [{"params": [m], "lr": rate} for m, rate in zip(masters, rates, strict=True)],
        betas=(0.9, 0.95),
    )
    total = options.epochs * (len(batches) - held)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda n: (1 + math.cos(math.pi * min(n / total, 1))) / 2
    )
    before = lowest = held_back()
    best = [m.detach().clone() for m in masters]
    for _ in range(options.epochs):
        for batch in batches[:-held]:
            with torch.enable_grad():
                loss = step.error(weights(), batch)
            for master, gradient, mask in zip(
                masters, torch.autograd.grad(loss, masters), masks, strict=True
            ):
                master.grad = gradient.mul_(mask)
            adam.step()
            schedule.step()
        error = held_back()
        if error < lowest:
            lowest, best = error, [m.detach().clone() for m in masters]
    for parameter, value in zip(parameters, best, strict=True):
        parameter.data.copy_(value)
    return Tuned(before, lowest)
