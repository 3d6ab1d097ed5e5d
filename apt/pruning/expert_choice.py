"""The choice of the experts to remove."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from apt.adapter import Routing
from apt.pruning.routed_experts import RoutedExperts
from apt.solver import ColumnGroups


class ExpertChoice(Protocol):
    """A function that chooses experts of one block."""

    def __call__(self, experts: RoutedExperts, groups: ColumnGroups, /) -> Tensor:
        """Choose experts to remove, as many from each bin.

        Args:
            experts: the experts of a block on calibration tokens.
            groups: the number of experts, and that of those that are kept; see
                `ColumnGroups.lowest`.

        Returns:
            The mask (experts,) of the experts to remove.
        """


@dataclass(frozen=True)
class ExpertRemoval:
    """How the experts of a block become fewer.

    Args:
        choose: the choice of the experts; None for the effect of each alone on the block's output.
        merge: True if the removed ones are averaged into those that are left.
        compensate: True if the last weights of those that are left are solved for the output of
            the dense block.
        named: True if a user named the choice. Another choice falls back to the effects if what a
            router decides cannot be read.
    """

    choose: ExpertChoice | None = None
    merge: bool = False
    compensate: bool = False
    named: bool = False


def joint_experts(experts: RoutedExperts, groups: ColumnGroups) -> Tensor:
    """The experts to remove, chosen greedily by what the others make of their tokens.

    Without an expert, the router sends its tokens to others. The loss of a removal is the change of
    the sum of the experts' outputs, with the router choosing among those that are left, relative to
    the stream. Each step removes the expert of least loss, given all removals before. Then removed
    experts are exchanged for others as long as that lowers the loss, in at most one pass.

    Args:
        experts: the experts of a block, on calibration tokens.
        groups: the number that is kept, of each bin.

    Returns:
        The mask (experts,) of the experts to remove.
    """
    search = _Search(experts, groups)
    for _ in range(groups.removed):
        search.remove()
    for expert in search.removed.nonzero().squeeze(1).tolist():
        search.exchange(expert)
    return search.removed.cpu()


class _Search:
    """A greedy removal; ``removed`` (experts,) is True for the experts that are gone."""

    def __init__(self, experts: RoutedExperts, groups: ColumnGroups) -> None:
        self._experts, self._groups = experts, groups
        self._dense = experts.output(experts.routing)
        self.removed = torch.zeros(groups.count, dtype=torch.bool, device=experts.sizes.device)
        self._loss = 0.0

    def remove(self) -> None:
        """Remove the expert without which the loss is lowest."""
        losses = self._losses_without(self.removed, self._full_bins())
        cheapest = int(losses.argmin())
        self.removed[cheapest], self._loss = True, float(losses[cheapest])

    def exchange(self, expert: int) -> None:
        """Restore an expert, and remove that of its bin without which the loss is lowest."""
        restored = self.removed.clone()
        restored[expert] = False
        size = self._groups.count // self._groups.bins
        others = (b for b in range(self._groups.bins) if b != expert // size)
        losses = self._losses_without(restored, others)
        losses[expert] = math.inf
        cheapest = int(losses.argmin())
        if float(losses[cheapest]) < self._loss:
            restored[cheapest] = True
            self.removed, self._loss = restored, float(losses[cheapest])

    def _full_bins(self) -> Iterable[int]:
        """The bins that have lost all that they lose."""
        each = self.removed.view(self._groups.bins, -1).sum(1)
        return (each >= self._groups.removed // self._groups.bins).nonzero().squeeze(1).tolist()

    def _losses_without(self, removed: Tensor, closed: Iterable[int]) -> Tensor:
        """The loss without each expert (experts,) beside ``removed``; ∞ in the ``closed`` bins."""
        losses = self._local(removed) if self._is_local else self._every(removed)
        self._experts.over_ranks(losses)
        losses[removed] = math.inf
        for each in closed:
            losses.view(self._groups.bins, -1)[each] = math.inf
        return losses

    def _local(self, removed: Tensor) -> Tensor:
        """The losses from one run of the router for each pick.

        In that run, every token lacks the expert that it picks there.
        """
        routing = self._experts.rerouted(removed)
        now = self._errors(routing)
        losses = now.sum().repeat(self._groups.count)
        for pick in routing.index.T:
            lacking = removed | torch.nn.functional.one_hot(pick, len(removed)).bool()
            change = self._errors(self._experts.rerouted(lacking)) - now
            losses.index_add_(0, pick[: len(change)], change)
        return losses

    def _every(self, removed: Tensor) -> Tensor:
        """The losses from a run of the router for each expert that is left."""
        losses = torch.zeros(len(removed), dtype=torch.double, device=removed.device)
        for expert in (~removed).nonzero().squeeze(1).tolist():
            lacking = removed.clone()
            lacking[expert] = True
            losses[expert] = self._errors(self._experts.rerouted(lacking)).sum()
        return losses

    @cached_property
    def _is_local(self) -> bool:
        """True if the removal of an expert changes nothing for the tokens that do not pick it.

        It changes their weights if these are shares of all experts, as in Qwen2-MoE, and it may
        change their experts if a router selects groups of experts first.
        """
        routing = self._experts.routing
        rarest = int(self._experts.sums(torch.ones_like(routing.weights)).argmin())
        removed = torch.zeros_like(self.removed)
        removed[rarest] = True
        other, rest = self._experts.rerouted(removed), (routing.index != rarest).all(1)
        same = torch.equal(other.index[rest], routing.index[rest])
        same = same and torch.allclose(other.weights[rest], routing.weights[rest])
        return not self._experts.over_ranks(torch.tensor([float(not same)]))

    def _errors(self, routing: Routing) -> Tensor:
        """The relative error of each of the first tokens (few,) with these experts."""
        lost = self._dense - self._experts.output(routing)
        return lost.square().sum(1).double() / self._experts.sizes[: len(lost)]
