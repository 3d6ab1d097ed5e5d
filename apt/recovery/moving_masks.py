"""Masks that move during a training, with exact counts (after RigL, arXiv 1911.11134).

At some steps, each row of a weight loses some of its smallest kept weights, and regrows the same
number of pruned weights with the largest gradients. The number of pruned weights of every row stays
the same, and for n:m that of every group. A regrown weight starts at a tiny value instead of zero.
It may never get a gradient if its neuron has lost all outputs, and would then be an additional
zero.
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
_SHARE = 0.1  # of the kept weights of a row, in the first exchange; it decays along a cosine
_LAST_MOVE = 0.75  # share of the steps: the last regrown weights are trained in the remaining steps
_START = 2.0**-20  # of a regrown weight: no effect on the loss, and not 0 in float16
_GROUPS = (2, 4, 8, 16, 32, 64)
_EQUAL_GROUPS = 0.99  # the least share of groups with equal counts in an n:m mask


def moving_steps(steps: int) -> list[int]:
    """The steps after which masks move."""
    last = int(_LAST_MOVE * steps)
    return sorted({round(last * (k + 1) / _EXCHANGES) for k in range(_EXCHANGES)} - {0})


def share_at(step: int, steps: int) -> float:
    """The share of the kept weights of a row that is exchanged after ``step``."""
    return _SHARE * (1 + math.cos(math.pi * min(1.0, step / (_LAST_MOVE * steps)))) / 2


def group_of(mask: Tensor) -> int | None:
    """The size m of the groups of an n:m mask (out, in); None for another mask.

    All groups have at least the m − n zeros of the pattern. A few groups have more, because weights
    were zero before.
    """
    for size in _GROUPS:
        if mask.shape[1] % size == 0:
            counts = mask.view(len(mask), -1, size).sum(-1)
            least = counts.min()
            if 0 < int(least) < size and float((counts == least).float().mean()) >= _EQUAL_GROUPS:
                return size
    return None


@dataclass(frozen=True)
class _MaskedSite:
    """A masked site, its parameter, and the size of its groups."""

    parameter: nn.Parameter
    site: Site
    group: int | None

    def view(self, tensor: Tensor) -> Tensor:
        """The part (out, in) of a tensor in the shape of the parameter."""
        return self.site.oriented(self.site.slice_of(tensor))


class MovingMasks:
    """The masks of a training by parameter, True where pruned. They are changed in place."""

    def __init__(
        self, model: nn.Module, adapter: Adapter, masks: Mapping[str, Tensor], steps: int
    ) -> None:
        self._masks, self._steps = masks, steps
        self._move_steps = set(moving_steps(steps))
        self._sites = list(_masked_sites(model, adapter, masks))
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._parameters = {name: entry.parameter for name, entry in self._sites}

    def moves_after(self, step: int) -> bool:
        """True if the masks move after ``step``, counted from 1."""
        return step in self._move_steps

    def add_gradient(self, name: str, gradient: Tensor) -> None:
        """Add the gradient of a parameter, before it is masked."""
        if (parameter := self._parameters.get(name)) is None:
            return  # the parameter of an extra, whose mask is fixed
        total = self._gradients.get(parameter)
        self._gradients[parameter] = gradient.clone() if total is None else total + gradient

    def save(self, folder: Path) -> None:
        """Write the masks beside a checkpoint."""
        write_masks(dict(self._masks), folder / MASKS)

    def restore(self, folder: Path) -> None:
        """Read the masks of a checkpoint."""
        for name, mask in read_masks(folder / MASKS).items():
            self._masks[name].copy_(mask)

    @torch.no_grad()
    def move(self, step: int, optimizer: torch.optim.Optimizer) -> int:
        """Exchange weights after ``step``; returns the number of exchanges."""
        share, moved = share_at(step, self._steps), 0
        if dist.is_available() and dist.is_initialized():
            self._add_up()
        for name, masked in self._sites:
            if (gradient := self._gradients.get(masked.parameter)) is not None:
                weight, mask = masked.view(masked.parameter), masked.view(self._masks[name])
                moved += _exchange(weight, masked.view(gradient), mask, masked.group, share)
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

        All processes add the parameters in the order of the model. A process without a gradient,
        for instance of an expert without tokens, adds zeros.
        """
        parameters = list(dict.fromkeys(self._parameters.values()))
        device = parameters[0].device if parameters else None
        has_gradient = torch.tensor([p in self._gradients for p in parameters], device=device).int()
        dist.all_reduce(has_gradient)
        for parameter, count in zip(parameters, has_gradient.tolist(), strict=True):
            if count:
                gradient = self._gradients.setdefault(parameter, torch.zeros_like(parameter))
                dist.all_reduce(gradient)


def _masked_sites(
    model: nn.Module, adapter: Adapter, masks: Mapping[str, Tensor]
) -> Iterator[tuple[str, _MaskedSite]]:
    for block_name, block in adapter.blocks(model):
        for site in adapter.sites(block):
            name = f"{block_name}.{site.parameter}"
            if name not in masks:
                continue
            group = group_of(site.oriented(site.slice_of(masks[name])))
            yield name, _MaskedSite(block.get_parameter(site.parameter), site, group)


def _exchange(
    weight: Tensor, gradient: Tensor, mask: Tensor, group: int | None, share: float
) -> int:
    """Exchange weights in each row of ``weight`` and ``mask`` (out, in); returns their number.

    Both are changed in place. The caller sets the newly pruned weights to zero.
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
        dropped, grown, usable = _group_exchange(size, gain, group, int(share * kept / len(mask)))
    rows = torch.arange(len(mask), device=mask.device).unsqueeze(1).expand_as(dropped)[usable]
    mask[rows, dropped[usable]] = True
    mask[rows, grown[usable]] = False
    start = torch.full_like(weight[rows, grown[usable]], _START)
    weight[rows, grown[usable]] = start.copysign(-gradient[rows, grown[usable]])
    return int(usable.sum())


def _group_exchange(
    size: Tensor, gain: Tensor, group: int, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One exchange in each of the ``count`` groups of a row with the largest gradients."""
    grouped = size.view(len(size), -1, group), gain.view(len(gain), -1, group)
    (least, smallest), (best, at) = grouped[0].min(-1), grouped[1].max(-1)
    chosen = best.topk(min(count, best.shape[1]), 1).indices
    start = chosen * group
    dropped, grown = start + smallest.gather(1, chosen), start + at.gather(1, chosen)
    usable = (least.gather(1, chosen) < torch.inf) & (best.gather(1, chosen) >= 0)
    return dropped, grown, usable
