"""Block tuning: the kept weights of a pruned block are tuned towards the dense output.

The closed form of a layer ignores the nonlinear operations between the layers of a block. So, as in
EBFT (arXiv 2402.12419), the kept weights of a block are tuned by gradient descent, with fixed
masks, towards the output of the dense block on the dense stream. With few calibration samples this
overfits (arXiv 2406.15524). Therefore some batches are held back, and tuning takes the weights with
the lowest error on the batches held back. If no step lowers this error, the weights do not
change.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apt.adapter import Site
from apt.calibration.batches import Batch, OpenBlock
from apt.calibration.dense_activations import bounded
from apt.tuning.block_forward import stream_after


@dataclass(frozen=True)
class BlockTuning:
    """The options of a block's tuning.

    Args:
        rate: the initial learning rate of Adam for an error of 1, as a share of the root mean
            square of each weight. It is multiplied by the square root of the initial error, to
            which deviations are proportional. It decays to zero along a cosine.
        held_back: the share of the batches that is held back; at least one batch is held back.
        tokens_per_batch: the approximate number of tokens of a step; see `step_tokens`.
        tokens: the approximate greatest number of tokens, from evenly spaced samples; at least two
            samples. None uses all samples.

    If the block computes in bf16, see `OpenBlock.autocast`, the products of the forward and the
    backward pass are bf16. The error on the batches held back is measured in fp32.
    """

    rate: float
    epochs: int
    held_back: float = 0.125
    tokens_per_batch: int = 1024
    tokens: int | None = None

    def chosen(self, samples: int, seqlen: int) -> Tensor:
        """A mask over the samples (samples,): True for those that tuning uses."""
        count = samples if self.tokens is None else min(samples, max(2, self.tokens // seqlen))
        chosen = torch.zeros(samples, dtype=torch.bool)
        chosen[torch.arange(count) * samples // count] = True
        return chosen

    def step_tokens(self, samples: int, seqlen: int) -> int:
        """The approximate number of tokens of a step: at most half, as one batch is held back."""
        return min(self.tokens_per_batch, math.ceil(samples / 2) * seqlen)


@dataclass(frozen=True)
class Tuned:
    """The error of a block's output on the batches held back, before and after tuning.

    The error of a batch is the mean over its tokens of ``e = ‖h − h_dense‖² / ‖h_dense‖²``, with
    the divisor bounded below, and ``1 + ln e`` in place of an ``e`` above 1. The error is the mean
    over the batches, which are of about equal size.
    """

    before: float
    after: float


def tune_block(block: OpenBlock, sites: Sequence[Site], options: BlockTuning) -> Tuned | None:
    """Tune the kept weights of ``sites`` in place.

    The steps do not depend on the number of ranks: all ranks take each step together, with the
    gradient from the rank that has the batch.

    Args:
        block: the block. Its batches have the dense activations after the block. The last batches
            of all ranks are held back. Its ``progress`` is called after each step, and after each
            batch on which the error is measured.

    Returns:
        The errors before and after; None if there are too few batches to hold one back.
    """
    ranks, batches = block.ranks, block.batches
    count = round(ranks.sum(len(batches)))
    held_back = max(1, round(options.held_back * count))
    if count <= held_back:
        return None
    first_held_back = len(ranks.mine(range(count - held_back)))
    descent = _Descent(block, sites)
    before = lowest = descent.error(batches[first_held_back:], held_back)
    for group in descent.adam.param_groups:
        group["lr"] *= options.rate * math.sqrt(before)
    steps = options.epochs * (count - held_back)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        descent.adam, lambda n: (1 + math.cos(math.pi * min(n / steps, 1))) / 2
    )
    for _ in range(options.epochs):
        for turn in range(count - held_back):
            index, owner = turn // ranks.size, ranks.owner(turn)
            descent.descend(batches[index] if owner == ranks.rank else None, owner)
            schedule.step()
            block.progress()
        error = descent.error(batches[first_held_back:], held_back)
        if error < lowest:
            lowest = error
            descent.write()
    descent.share()
    return Tuned(before, lowest)


def _limited(errors: Tensor) -> Tensor:
    """Relative errors of tokens, with logarithms above 1.

    If a block of the dense model removes the massive activation of a token, the remaining stream is
    small. A small relative error of the block is then many times as large as the remaining stream.
    Without the logarithm, such a token would outweigh all others, and raise the learning rate.
    """
    return torch.where(errors > 1, 1 + errors.clamp_min(1).log(), errors)


class _Descent:
    """The kept weights of a block in fp32, with their masks and the state of Adam.

    They take several times the memory of the block, which is large if it has experts. So there is
    no further copy: the block itself stores the best weights, and gradients are freed early.
    """

    def __init__(self, block: OpenBlock, sites: Sequence[Site]) -> None:
        self._block = block
        names = dict.fromkeys(site.parameter for site in sites)  # experts are slices of one
        self._parameters = {name: block.module.get_parameter(name).detach() for name in names}
        masters = {name: p.to(torch.float32, copy=True) for name, p in self._parameters.items()}
        masks = {
            name: torch.zeros_like(master, dtype=torch.bool) for name, master in masters.items()
        }
        for site in sites:
            site.slice_of(masks[site.parameter]).copy_(site.weight(block.module) != 0)
        sizes = [  # 0 for a weight that is zero everywhere
            float(master[mask].square().mean().nan_to_num().sqrt())
            for master, mask in zip(masters.values(), masks.values(), strict=True)
        ]
        self._masks = list(masks.values())
        self._masters = [master.requires_grad_() for master in masters.values()]
        groups = [
            {"params": [master], "lr": size}
            for master, size in zip(self._masters, sizes, strict=True)
        ]
        self.adam = torch.optim.Adam(groups, betas=(0.9, 0.95))

    def write(self) -> None:
        """Write the weights to the block."""
        for parameter, master in zip(self._parameters.values(), self._masters, strict=True):
            parameter.copy_(master.detach())

    def share(self) -> None:
        """Copy the weights of the first rank: other ranks may have other roundings."""
        for parameter in self._parameters.values():
            self._block.ranks.send(parameter.data, 0)

    def error(self, batches: list[Batch], count: int) -> float:
        """The mean error over ``count`` batches: ``batches``, and those of the other ranks."""
        errors = list[Tensor]()
        for batch in batches:
            with torch.no_grad():
                errors.append(self._error(batch))
            self._block.progress()
        local_sum = sum(torch.stack(errors).tolist()) if errors else 0.0  # one wait for a device
        return self._block.ranks.sum(local_sum) / count

    def _error(self, batch: Batch) -> Tensor:
        """The error of a batch, as `Tuned` defines it."""
        assert batch.dense is not None
        parts = zip(self._parameters.items(), self._masters, strict=True)
        weights = {name: master.to(p.dtype) for (name, p), master in parts}
        call = batch.calls[self._block.index]
        pruned = stream_after(self._block, weights, batch.state, call).float()
        dense = self._block.adapter.residual(batch.dense.state).float()
        errors = (pruned - dense).square().sum(-1) / bounded(dense.square().sum(-1))
        return _limited(errors).mean()

    def descend(self, batch: Batch | None, owner: int) -> None:
        """Take one step on the batch of rank ``owner``; pruned weights stay zero."""
        for master, gradient in zip(self._masters, self._gradients(batch), strict=True):
            self._block.ranks.send(gradient, owner)
            master.grad = gradient
        self.adam.step()
        self.adam.zero_grad()

    def _gradients(self, batch: Batch | None) -> list[Tensor]:
        """The gradients of the error on ``batch``; empty tensors if another rank has the batch."""
        if batch is None:
            return [torch.empty_like(master) for master in self._masters]
        with torch.enable_grad(), self._block.autocast:
            loss = self._error(batch)
        gradients = torch.autograd.grad(
            loss, self._masters, allow_unused=True, materialize_grads=True
        )
        return [g.mul_(mask) for g, mask in zip(gradients, self._masks, strict=True)]
