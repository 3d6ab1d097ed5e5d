"""Masks that move during a training, with exact counts (after RigL, arXiv 1911.11134).

Now and then each row of a weight loses some of its smallest kept weights, and gets back as many
pruned weights with the largest gradients. Every row keeps its number of pruned weights, and for
n:m every group does. A weight that comes back begins beside zero, not at zero: it may never get a
gradient, where the neuron that it feeds has lost all its outputs, and would then be one zero too
many.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apt.adapter import Adapter, Site
from apt.checkpoints.masks import MASKS, read_masks, write_masks

_EXCHANGES = 20
_SHARE = 0.1  # of the kept weights of a row, in the first exchange; it falls along a cosine
_UNTIL = 0.75  # of the steps: the last weights that are grown are trained for the rest
_START = 2.0**-20  # of a weight that comes back: no effect on the loss, and not 0 in float16
_GROUPS = (2, 4, 8, 16, 32, 64)
_ALIKE = 0.99  # the least share of the groups that have the same count, in an n:m mask


def moving_steps(steps: int) -> list[int]:
    """The steps after which masks move."""
    last = int(_UNTIL * steps)
    return sorted({round(last * (k + 1) / _EXCHANGES) for k in range(_EXCHANGES)} - {0})


def share_at(step: int, steps: int) -> float:
    """The share of the kept weights of a row that is exchanged after ``step``."""
    return _SHARE * (1 + math.cos(math.pi * min(1.0, step / (_UNTIL * steps)))) / 2


def group_of(mask: Tensor) -> int | None:
    """The size m of the groups of an n:m mask (out, in); None for another mask.

    All groups have at least the m − n zeros of the pattern. A few have more, where weights were
    zero before.
    """
    for size in _GROUPS:
        if mask.shape[1] % size == 0:
            counts = mask.view(len(mask), -1, size).sum(-1)
            least = counts.min()
            if 0 < int(least) < size and float((counts == least).float().mean()) >= _ALIKE:
                return size
    return None


@dataclass(frozen=True)
class _Entry:
    """A site with its parameter and the size of its groups."""

    parameter: nn.Parameter
    site: Site
    group: int | None

    def view(self, tensor: Tensor) -> Tensor:
        """The part (out, in) of a tensor in the shape of the parameter."""
        return self.site.oriented(self.site.slice_of(tensor))


class MovingMasks:
    """The masks of a training by parameter, True where pruned; they are changed in place."""

    def __init__(
        self, model: nn.Module, adapter: Adapter, masks: Mapping[str, Tensor], steps: int
    ) -> None:
        self._masks, self._steps = masks, steps
        self._at = set(moving_steps(steps))
        self._entries = list(_entries(model, adapter, masks))
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._parameters = {name: entry.parameter for name, entry in self._entries}

    def wants(self, step: int) -> bool:
        """True if the masks move after ``step``, counted from 1."""
        return step in self._at

    def see(self, name: str, gradient: Tensor) -> None:
        """Add the gradient of a parameter, before it is masked."""
        if (parameter := self._parameters.get(name)) is None:
            return  # of an extra: its mask stays
        known = self._gradients.get(parameter)
        self._gradients[parameter] = gradient.clone() if known is None else known + gradient

    def save(self, folder: Path) -> None:
        """Write the masks beside a checkpoint."""
        write_masks(dict(self._masks), folder / MASKS)

    def restore(self, folder: Path) -> None:
        """Take the masks of a checkpoint."""
        for name, mask in read_masks(folder / MASKS).items():
            self._masks[name].copy_(mask)

    @torch.no_grad()
    def move(self, step: int, optimizer: torch.optim.Optimizer) -> int:
        """Exchange weights after ``step``; the number of exchanges."""
        share, moved = share_at(step, self._steps), 0
        if dist.is_available() and dist.is_initialized():
            self._add_up()
        for name, entry in self._entries:
            if (seen := self._gradients.get(entry.parameter)) is not None:
                weight, mask = entry.view(entry.parameter), entry.view(self._masks[name])
                moved += _exchange(weight, entry.view(seen), mask, entry.group, share)
        for name, parameter in self._parameters.items():
            mask = self._masks[name]
            parameter.masked_fill_(mask, 0)
            for state in optimizer.state.get(parameter, {}).values():
                if isinstance(state, Tensor) and state.shape == parameter.shape:
                    state.masked_fill_(mask, 0)
        self._gradients.clear()
        return moved

    def _add_up(self) -> None:
        """Add the gradients of all processes, so that all of them move the same weights.

        They go through the parameters in the order of the model, whatever each of them has seen. A
        process without a gradient, as of an expert that got none of its tokens, adds zeros.
        """
        parameters = list(dict.fromkeys(self._parameters.values()))
        device = parameters[0].device if parameters else None
        seen = torch.tensor([p in self._gradients for p in parameters], device=device).int()
        dist.all_reduce(seen)
        for parameter, count in zip(parameters, seen.tolist(), strict=True):
            if count:
                gradient = self._gradients.setdefault(parameter, torch.zeros_like(parameter))
                dist.all_reduce(gradient)


def _entries(
    model: nn.Module, adapter: Adapter, masks: Mapping[str, Tensor]
) -> Iterator[tuple[str, _Entry]]:
    for block_name, block in adapter.blocks(model):
        for site in adapter.sites(block):
            name = f"{block_name}.{site.parameter}"
            if name not in masks:
                continue
            group = group_of(site.oriented(site.slice_of(masks[name])))
            yield name, _Entry(block.get_parameter(site.parameter), site, group)


def _exchange(
    weight: Tensor, gradient: Tensor, mask: Tensor, group: int | None, share: float
) -> int:
    """Exchange weights in each row of ``weight`` and ``mask`` (out, in); the number of exchanges.

    Both are changed in place; the weights that are lost are zeroed by the caller.
    """
    size = weight.abs().masked_fill(mask, torch.inf)
    gain = gradient.abs().masked_fill(~mask, -1)
    kept = int((~mask).sum())
    if group is None:
        count = min(int(share * kept / len(mask)), int(mask.sum(1).min()))
        if not count:
            return 0
        dropped, grown = size.topk(count, 1, largest=False).indices, gain.topk(count, 1).indices
        usable = (size.gather(1, dropped) < torch.inf) & (gain.gather(1, grown) >= 0)
    else:
        dropped, grown, usable = _in_groups(size, gain, group, int(share * kept / len(mask)))
    rows = torch.arange(len(mask), device=mask.device).unsqueeze(1).expand_as(dropped)[usable]
    mask[rows, dropped[usable]] = True
    mask[rows, grown[usable]] = False
    start = torch.full_like(weight[rows, grown[usable]], _START)
    weight[rows, grown[usable]] = start.copysign(-gradient[rows, grown[usable]])
    return int(usable.sum())


def _in_groups(size: Tensor, gain: Tensor, group: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """One exchange in each of the ``count`` groups of a row with the largest gradients."""
    grouped = size.view(len(size), -1, group), gain.view(len(gain), -1, group)
    (least, smallest), (best, at) = grouped[0].min(-1), grouped[1].max(-1)
    chosen = best.topk(min(count, best.shape[1]), 1).indices
    start = chosen * group
    dropped, grown = start + smallest.gather(1, chosen), start + at.gather(1, chosen)
    usable = (least.gather(1, chosen) < torch.inf) & (best.gather(1, chosen) >= 0)
    return dropped, grown, usable
