"""Masks that move during a training, with exact counts.

The forward pass uses the kept weights alone, and the optimizer updates all weights. A pruned weight
gets the gradient that the loss has at its value 0 (the straight-through estimator, as in SR-STE,
arXiv 2102.04010), and collects its updates in a *latent* value. At some steps all kept and latent
values are ranked by their effect, and those of the least effect are pruned. The effect of setting a
weight w to zero is w² v to second order, with Adam's second moment v as the curvature (optimal
brain damage, LeCun et al., 1989). For an optimizer without this moment it is w². The number of
pruned weights of each matrix stays the same, and for n:m the number of each group.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from apt.adapter import Adapter, Site
from apt.checkpoints.masks import MASKS, read_masks, write_masks
from apt.patterns import lowest_k

_MOVES = 60
_LAST_MOVE = 0.75  # share of the steps: the last masks are trained in the remaining steps
_LATENT = "apt_latent.safetensors"  # the file beside a checkpoint
_GROUPS = (2, 4, 8, 16, 32, 64)
_EQUAL_GROUPS = 0.99  # the least share of groups with equal counts in an n:m mask


def moving_steps(steps: int) -> list[int]:
    """The steps after which masks move."""
    last = int(_LAST_MOVE * steps)
    return sorted({round(last * (k + 1) / _MOVES) for k in range(_MOVES)} - {0})


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
    """A masked site and the size of its groups."""

    site: Site
    group: int | None

    def view(self, tensor: Tensor) -> Tensor:
        """The part (out, in) of a tensor in the shape of the parameter."""
        return self.site.oriented(self.site.slice_of(tensor))


class MovingMasks:
    """The masks of a training by parameter, True where pruned. They are changed in place.

    Attributes:
        last_move: the step after which the masks move for the last time; 0 if they never move.
    """

    def __init__(
        self, model: nn.Module, adapter: Adapter, masks: Mapping[str, Tensor], steps: int
    ) -> None:
        self._masks, self._move_steps = masks, moving_steps(steps)
        self.last_move = self._move_steps[-1] if self._move_steps else 0
        self._sites = _masked_sites(model, adapter, masks)
        self._parameters = {name: model.get_parameter(name) for name in self._sites}
        self._latent = dict[str, Tensor]()  # the values of pruned weights, and 0 for kept ones

    def moves(self, name: str, step: int) -> bool:
        """True if a mask still moves in ``step``, counted from 1, or after it.

        The gradient of the parameter is then not masked. The masks of extras are fixed.
        """
        return name in self._parameters and step <= self.last_move

    def save(self, folder: Path) -> None:
        """Write the masks and the latent values beside a checkpoint."""
        write_masks(dict(self._masks), folder / MASKS)
        if self._latent:
            save_file(self._latent, folder / _LATENT)

    def restore(self, folder: Path) -> None:
        """Read the masks and the latent values of a checkpoint."""
        for name, mask in read_masks(folder / MASKS).items():
            self._masks[name].copy_(mask)
        saved = load_file(folder / _LATENT) if (folder / _LATENT).exists() else {}
        self._latent = {name: v.to(self._masks[name].device) for name, v in saved.items()}

    @torch.no_grad()
    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> int:
        """Collect the updates of pruned weights, and move the masks if this is a step for it.

        All processes of a training have the same weights and moments, and so the same masks.

        Returns:
            The number of exchanged weights.
        """
        exchanges = 0
        for name, parameter in self._parameters.items():
            if not self.moves(name, step):
                continue
            mask = self._masks[name]
            latent = self._latent.setdefault(name, torch.zeros_like(parameter))
            latent.add_(parameter.masked_fill(~mask, 0))
            if step in self._move_steps:
                exchanges += self._move(name, parameter, latent, optimizer)
            parameter.masked_fill_(mask, 0)
            if step == self.last_move:
                _clear_moments(optimizer, parameter, mask)
                del self._latent[name]
        return exchanges

    def _move(
        self, name: str, parameter: Tensor, latent: Tensor, optimizer: torch.optim.Optimizer
    ) -> int:
        """Prune the weights of the least effect of a parameter; returns the number of exchanges."""
        mask = self._masks[name]
        values, before = torch.where(mask, latent, parameter), mask.clone()
        moment = optimizer.state.get(parameter, {}).get("exp_avg_sq")
        effect = values.square()
        if isinstance(moment, Tensor) and moment.shape == effect.shape:
            effect *= moment
        # A pruned weight without any update stays pruned: kept, it would be an additional zero.
        effect.masked_fill_(mask & (latent == 0), -1)
        for masked in self._sites[name]:
            _prune_least(masked.view(effect), masked.view(mask), masked.group)
        parameter.copy_(values)
        latent.copy_(values.masked_fill_(~mask, 0))
        return int((mask & ~before).sum())


def _clear_moments(optimizer: torch.optim.Optimizer, parameter: Tensor, mask: Tensor) -> None:
    """Set the moments of pruned weights to 0."""
    for state in optimizer.state.get(parameter, {}).values():
        if isinstance(state, Tensor) and state.shape == parameter.shape:
            state.masked_fill_(mask, 0)


def _masked_sites(
    model: nn.Module, adapter: Adapter, masks: Mapping[str, Tensor]
) -> dict[str, list[_MaskedSite]]:
    """The masked sites of each parameter; stacked experts share one."""
    found: dict[str, list[_MaskedSite]] = {}
    for block_name, block in adapter.blocks(model):
        for site in adapter.sites(block):
            name = f"{block_name}.{site.parameter}"
            if name in masks:
                group = group_of(site.oriented(site.slice_of(masks[name])))
                found.setdefault(name, []).append(_MaskedSite(site, group))
    return found


def _prune_least(effect: Tensor, mask: Tensor, group: int | None) -> None:
    """Set ``mask`` (out, in), in place, at the least effects (out, in), with the same counts."""
    if group is None:
        mask.copy_(lowest_k(effect.reshape(1, -1), int(mask.sum())).view_as(mask))
        return
    shape = (len(effect), -1, group)
    counts = mask.reshape(shape).sum(-1, keepdim=True)
    ranks = effect.reshape(shape).argsort(-1).argsort(-1)
    mask.copy_((ranks < counts).view_as(mask))
