"""Local reconstruction: a pruned block's kept weights, tuned towards what the dense block gives.

What a closed form cannot see is what the block does between its weights. So, as EBFT does (arXiv
2402.12419), the kept weights of a block are tuned by gradient, masks fixed, towards the output
that the dense block gives on the dense stream. On little calibration text that overfits (arXiv
2406.15524): a part of the batches is held back, the weights that do best on it are taken, and where
none does better than the start, the start stays.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Site
from apt.calibration.batches import Batch
from apt.distributed.ranks import Ranks
from apt.tuning.block_forward import mixed_precision, stream_after


@dataclass(frozen=True)
class Reconstruction:
    """How a block is tuned.

    Args:
        rate: the first learning rate of Adam, as a share of each weight's root mean square, where
            the error is 1: it goes with the root of the error, as what there is to make up for
            does. It falls to zero along a cosine.
        epochs: how often the batches are passed, at most.
        held_back: the share of the batches that is held back, at least one.
        tokens_per_batch: about as many tokens make a step.
        tokens: at most about as many are passed, of samples evenly spread, but two samples at
            least, so that one can be held back; None passes all.

    Of fp32 weights, the products of forward and backward are bf16 where the machine has them; what
    is held back is measured in fp32.
    """

    rate: float = 0.025
    epochs: int = 8
    held_back: float = 0.125
    tokens_per_batch: int = 1024
    tokens: int | None = None

    def chosen(self, samples: int, seqlen: int) -> Tensor:
        """True for each of the samples (samples,) that is passed."""
        count = samples if self.tokens is None else min(samples, max(2, self.tokens // seqlen))
        chosen = torch.zeros(samples, dtype=torch.bool)
        chosen[torch.arange(count) * samples // count] = True
        return chosen


@dataclass(frozen=True)
class Tuned:
    """The error of a block's output on the batches held back, before and after tuning.

    The error is the mean over tokens of ``‖h − h_dense‖² / ‖h_dense‖²``.
    """

    before: float
    after: float


def reconstruct(
    adapter: Adapter,
    block: nn.Module,
    index: int,
    batches: list[Batch],
    sites: Sequence[Site],
    options: Reconstruction,
    ranks: Ranks | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Tuned | None:
    """Tune the kept weights of ``sites`` in place; they change at the end alone.

    The steps are the same however many ranks there are: each is taken by all of them, along the
    gradient of the one that has its batch.

    Args:
        adapter: the block's adapter.
        block: the pruned block.
        index: its place among the blocks.
        batches: the states before the block, and with the dense activations after the block;
            of several ranks, those that were dealt to this one. The last of all are held back.
        sites: the sites to tune.
        options: how.
        ranks: the processes that tune together; None for a single one.
        tell: called after each step, and after each batch on which the error is measured.

    Returns:
        The errors before and after; None where there are too few batches to hold one back.
    """
    ranks = ranks or Ranks()
    count = round(ranks.sum(len(batches)))
    held = max(1, round(options.held_back * count))
    if count <= held:
        return None
    passed = len(ranks.mine(range(count - held)))
    tuning = _Tuning(adapter, block, index, sites, ranks, progress)
    before = lowest = tuning.error(batches[passed:], held)
    for group in tuning.adam.param_groups:
        group["lr"] *= options.rate * math.sqrt(before)
    best = tuning.snapshot()
    steps = options.epochs * (count - held)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        tuning.adam, lambda n: (1 + math.cos(math.pi * min(n / steps, 1))) / 2
    )
    for _ in range(options.epochs):
        for turn in range(count - held):
            place, owner = turn // ranks.size, ranks.owner(turn)
            tuning.descend(batches[place] if owner == ranks.rank else None, owner)
            schedule.step()
            progress()
        error = tuning.error(batches[passed:], held)
        if error < lowest:
            lowest, best = error, tuning.snapshot()
    tuning.write(best)
    return Tuned(before, lowest)


class _Tuning:
    """The kept weights of a block, in fp32, while Adam moves them."""

    def __init__(
        self,
        adapter: Adapter,
        block: nn.Module,
        index: int,
        sites: Sequence[Site],
        ranks: Ranks,
        progress: Callable[[], None],
    ) -> None:
        self._adapter, self._block, self._index = adapter, block, index
        self._ranks, self._progress = ranks, progress
        names = dict.fromkeys(site.parameter for site in sites)  # experts are slices of one
        self._parameters = {name: block.get_parameter(name).detach() for name in names}
        masters = {name: p.float().clone() for name, p in self._parameters.items()}
        masks = {name: torch.zeros_like(master) for name, master in masters.items()}
        for site in sites:
            kept = masks[site.parameter]
            kept = kept if site.expert is None else kept[site.expert]
            kept.copy_(site.weight(block) != 0)
        sizes = [
            float(master[mask != 0].square().mean().sqrt())
            for master, mask in zip(masters.values(), masks.values(), strict=True)
        ]
        self._mixed = mixed_precision(list(self._parameters.values()))
        self._masks = list(masks.values())
        self._masters = [master.requires_grad_() for master in masters.values()]
        groups = [
            {"params": [master], "lr": size}
            for master, size in zip(self._masters, sizes, strict=True)
        ]
        self.adam = torch.optim.Adam(groups, betas=(0.9, 0.95))

    def _weights(self) -> dict[str, Tensor]:
        parts = zip(self._parameters.items(), self._masters, strict=True)
        return {name: master.to(p.dtype) for (name, p), master in parts}

    def snapshot(self) -> list[Tensor]:
        """A copy of the weights."""
        return [master.detach().clone() for master in self._masters]

    def write(self, snapshot: list[Tensor]) -> None:
        """Put a snapshot into the block; the first rank's, should others have rounded otherwise."""
        for parameter, value in zip(self._parameters.values(), snapshot, strict=True):
            parameter.copy_(value)
            self._ranks.send(parameter.data, 0)

    def error(self, batches: list[Batch], count: int) -> float:
        """The mean error on ``batches`` and those of other ranks, ``count`` in all."""
        own = 0.0
        for batch in batches:
            with torch.no_grad():
                own += float(self._error(batch))
            self._progress()
        return self._ranks.sum(own) / count

    def _error(self, batch: Batch) -> Tensor:
        """See `Tuned`."""
        assert batch.dense is not None
        call = batch.calls[self._index]
        given = stream_after(self._adapter, self._block, self._weights(), batch.state, call).float()
        dense = self._adapter.residual(batch.dense.state).float()
        error: Tensor = ((given - dense).square().sum(-1) / dense.square().sum(-1)).mean()
        return error

    def descend(self, batch: Batch | None, owner: int) -> None:
        """One step on the ``owner``'s batch; what is pruned stays zero."""
        for master, gradient in zip(self._masters, self._gradients(batch), strict=True):
            self._ranks.send(gradient, owner)
            master.grad = gradient
        self.adam.step()

    def _gradients(self, batch: Batch | None) -> list[Tensor]:
        """Of the error on a batch; of another rank's, room for them."""
        if batch is None:
            return [torch.empty_like(master) for master in self._masters]
        with torch.enable_grad(), self._mixed:
            loss = self._error(batch)
        gradients = torch.autograd.grad(loss, self._masters)
        return [g.mul_(mask) for g, mask in zip(gradients, self._masks, strict=True)]
