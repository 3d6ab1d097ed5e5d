"""The choice of the experts to remove."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, update_wrapper
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
            groups: the number of experts, and the number of kept experts; see
                `ColumnGroups.lowest`.

        Returns:
            The mask (experts,) of the experts to remove.
        """


class LowestScores:
    """An `ExpertChoice` by scores: the experts of the lowest scores of each bin are removed.

    The scores do not depend on the number of removed experts, so a report keeps them.
    ``@lowest_scores`` turns a function into such a choice.
    """

    def __init__(self, scores: Callable[[RoutedExperts], Tensor]) -> None:
        update_wrapper(self, scores)
        self.scores = scores

    def __call__(self, experts: RoutedExperts, groups: ColumnGroups) -> Tensor:
        """The mask (experts,) of the experts to remove."""
        return lowest(self.scores(experts).cpu(), groups, experts.protected)


def lowest_scores(scores: Callable[[RoutedExperts], Tensor]) -> LowestScores:
    """A choice by the scores (experts,) that a function computes for the experts of a block."""
    return LowestScores(scores)


def lowest(scores: Tensor, groups: ColumnGroups, protected: Tensor | None = None) -> Tensor:
    """The mask (experts,) of the unprotected experts of the lowest scores."""
    if protected is not None:
        scores = scores.double().masked_fill(protected.cpu(), math.inf)
    return groups.lowest(scores)


PROTECTED_SHARE = 0.5
"""The share of the router weight of a source's tokens that its needed experts have."""


def needed(weights: Tensor, share: float = PROTECTED_SHARE) -> Tensor:
    """The fewest experts (experts,) that have this share of the router ``weights`` of a source."""
    order = weights.argsort(descending=True, stable=True)
    before = weights[order].cumsum(0) - weights[order]
    mask = torch.zeros(len(weights), dtype=torch.bool)
    mask[order[before < share * weights.sum()]] = True
    return mask


def protected_experts(
    weights: Sequence[Tensor], groups: ColumnGroups
) -> tuple[Tensor, tuple[int, ...]]:
    """The kept experts among the experts that some sources need, and the others.

    Args:
        weights: the router weight of each expert (experts,) on the tokens of each of the sources.
        groups: the number of experts, and the number of kept experts.

    Returns:
        The mask (experts,) of the kept experts, and the indices of the others. If a bin keeps fewer
        experts than are needed, the experts with the largest share of a source's weight are kept.
    """
    required = torch.stack([needed(each) for each in weights]).any(0)
    shares = torch.stack([each / each.sum().clamp_min(1e-30) for each in weights]).amax(0)
    first = shares.masked_fill(~required, -1.0)
    kept = ~groups.lowest(first.cpu()) & required
    return kept, tuple((required & ~kept).nonzero().squeeze(1).tolist())


def with_protected(removed: Tensor, experts: RoutedExperts, groups: ColumnGroups) -> Tensor:
    """A mask (experts,) of experts to remove, without protected experts.

    In place of protected experts, the unprotected experts of least router weight in their bins are
    removed.
    """
    protected = experts.protected
    if protected is None or not bool((removed.cpu() & protected).any()):
        return removed
    weight = experts.by_source.weights.sum(0)
    scores = weight.masked_fill(removed.cpu(), -1.0)  # chosen experts go first
    return lowest(scores, groups, protected)


@dataclass(frozen=True)
class ExpertRemoval:
    """The removal of experts of a block.

    Args:
        choose: the choice of the experts; None for the effect of each alone on the block's output.
        merge: True if removed experts are averaged into kept experts.
        compensate: True if the last weights of kept experts are solved for the output of the dense
            block.
        named: True if a user named the choice. Otherwise the run falls back to the effects if the
            decisions of the router cannot be read.
        protect: the names of sources of calibration text whose experts are kept.
        tokens: the least number of tokens on which each expert is judged; see `RoutedExperts`.
        dense: True if the experts of a block are judged on its inputs in the dense model.
        scores: the known scores of the experts of each block, by which they are chosen without a
            calibration.
    """

    choose: ExpertChoice | None = None
    merge: bool = False
    compensate: bool = False
    named: bool = False
    protect: tuple[str, ...] = ()
    tokens: int = 0
    dense: bool = False
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict)


def joint_experts(experts: RoutedExperts, groups: ColumnGroups) -> Tensor:
    """The experts to remove, chosen greedily by the joint loss with a rerouted router.

    Without an expert, the router sends its tokens to other experts. The loss of a removal is the
    change of the sum of the experts' outputs relative to the stream, with a router that chooses
    among the remaining experts. Each step removes the expert of least loss, given all earlier
    removals. Then each removed expert is exchanged once for another expert if that lowers the loss.

    Args:
        experts: the experts of a block, on calibration tokens.
        groups: the number of experts that are kept, in each bin.

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
    """A greedy removal; ``removed`` (experts,) is the mask of the removed experts."""

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
        """Restore an expert, and remove the expert of its bin whose removal loses least."""
        restored = self.removed.clone()
        restored[expert] = False
        size = self._groups.count // self._groups.bins
        other_bins = (index for index in range(self._groups.bins) if index != expert // size)
        losses = self._losses_without(restored, other_bins)
        losses[expert] = math.inf
        cheapest = int(losses.argmin())
        if float(losses[cheapest]) < self._loss:
            restored[cheapest] = True
            self.removed, self._loss = restored, float(losses[cheapest])

    def _full_bins(self) -> Iterable[int]:
        """The bins from which no further expert may be removed."""
        removed_per_bin = self.removed.view(self._groups.bins, -1).sum(1)
        full = removed_per_bin >= self._groups.removed // self._groups.bins
        return full.nonzero().squeeze(1).tolist()

    def _losses_without(self, removed: Tensor, closed: Iterable[int]) -> Tensor:
        """The loss (experts,) of each removal after ``removed``; ∞ in the ``closed`` bins."""
        by_picks = self._picks_suffice
        losses = self._losses_by_picks(removed) if by_picks else self._losses_by_experts(removed)
        self._experts.over_ranks(losses)
        losses[removed] = math.inf
        if self._experts.protected is not None:
            losses[self._experts.protected] = math.inf
        for closed_bin in closed:
            losses.view(self._groups.bins, -1)[closed_bin] = math.inf
        return losses

    def _losses_by_picks(self, removed: Tensor) -> Tensor:
        """The losses from one run of the router for each pick.

        In the run for the k-th pick, each token lacks the expert of its k-th pick.
        """
        routing = self._experts.rerouted(removed)
        errors = self._errors(routing)
        losses = errors.sum().repeat(self._groups.count)
        for pick in routing.index.T:
            without_pick = removed | torch.nn.functional.one_hot(pick, len(removed)).bool()
            change = self._errors(self._experts.rerouted(without_pick)) - errors
            losses.index_add_(0, pick[: len(change)], change)
        return losses

    def _losses_by_experts(self, removed: Tensor) -> Tensor:
        """The losses from a run of the router for each remaining expert."""
        losses = torch.zeros(len(removed), dtype=torch.double, device=removed.device)
        for expert in (~removed).nonzero().squeeze(1).tolist():
            without_expert = removed.clone()
            without_expert[expert] = True
            losses[expert] = self._errors(self._experts.rerouted(without_expert)).sum()
        return losses

    @cached_property
    def _picks_suffice(self) -> bool:
        """True if the removal of an expert changes nothing for the tokens that do not pick it.

        If weights are shares over all experts, as in Qwen2-MoE, a removal changes the weights of
        all tokens. If a router selects groups of experts first, it may change all choices.
        """
        routing = self._experts.routing
        rarest = int(self._experts.sums(torch.ones_like(routing.weights)).argmin())
        removed = torch.zeros_like(self.removed)
        removed[rarest] = True
        rerouted, unaffected = self._experts.rerouted(removed), (routing.index != rarest).all(1)
        same = torch.equal(rerouted.index[unaffected], routing.index[unaffected])
        same = same and torch.allclose(rerouted.weights[unaffected], routing.weights[unaffected])
        return not self._experts.over_ranks(torch.tensor([float(not same)]))

    def _errors(self, routing: Routing) -> Tensor:
        """The relative errors (few,) of the first tokens with this routing."""
        lost = self._dense - self._experts.output(routing)
        return lost.square().sum(1).double() / self._experts.sizes[: len(lost)]
