"""The removal of groups without readers: states of a scan, and experts.

No matrix multiplies the outputs of these groups. So they are chosen by what the block loses. Inside
a block that is pruned, the outputs of removed groups are zero, and its router does not choose them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apt.adapter import Groups
from apt.adapter.groups import disconnect, disconnected, tensors_of
from apt.calibration.batches import OpenBlock
from apt.calibration.sources import RoutedBySource
from apt.errors import AptError, faulty
from apt.planning.plan import PlannedGroups
from apt.pruning.expert_choice import (
    ExpertChoice,
    ExpertRemoval,
    LowestScores,
    lowest,
    protected_experts,
    with_protected,
)
from apt.pruning.expert_weights import compensate, dense_outputs
from apt.pruning.merging import merge_experts
from apt.pruning.routed_experts import RoutedExperts, routers_of
from apt.solver import ColumnGroups, MethodError
from apt.solver.group_removal import check_removed
from apt.tuning.block_forward import stream_after

_TOKENS = 2048


@dataclass(frozen=True)
class Disconnected:
    """The groups of one kind that a block has lost.

    Attributes:
        chosen: their indices.
        merged: those that were merged, each with the one that has them.
        by_source: what the experts get from each source; None if that is not known.
        scores: the scores (experts,) of the choice; empty if it has none.
        underserved: the experts with fewer tokens than they should have.
        unprotected: the experts that a protected source needs and for which there was no place.
    """

    chosen: tuple[int, ...]
    merged: tuple[tuple[int, int], ...] = ()
    by_source: RoutedBySource | None = None
    scores: tuple[float, ...] = ()
    underserved: tuple[int, ...] = ()
    unprotected: tuple[int, ...] = ()


def disconnect_groups(
    block: OpenBlock,
    planned: PlannedGroups,
    how: ExpertRemoval,
    damping: float | None,
    judged: OpenBlock | None = None,
) -> Disconnected:
    """Choose groups, and set their outputs to zero; see `ExpertRemoval` for experts.

    Args:
        judged: the block with the batches on which experts are judged; by default the same ones.
    """
    groups, chosen, merged = planned.groups, planned.chosen, tuple[tuple[int, int], ...]()
    experts = _readable(judged or block, groups, how) if groups.routed else None
    pattern = ColumnGroups(groups.count, planned.kept, groups.bins)
    scores, unprotected = tuple[float, ...](), tuple[int, ...]()
    if experts is not None and how.protect:
        own = [experts.by_source.weights[block.sources.index(name)] for name in how.protect]
        experts.protected, unprotected = protected_experts(own, pattern)
    if chosen is None and experts is not None and how.choose is not None:
        chosen, scores = _chosen(experts, pattern, how.choose)
    if chosen is not None and experts is not None:
        mask = with_protected(pattern.mask(chosen), experts, pattern)
        chosen = tuple(mask.nonzero().squeeze(1).tolist())
    chosen = tuple(block.ranks.share(chosen or _by_effect(block, planned)))
    targets = dense_outputs(block, groups) if experts is not None and how.compensate else []
    if experts is not None and how.merge:
        removed = pattern.mask(chosen)
        merged = merge_experts(block.module, block.adapter, groups, experts, removed)
    by_source = experts.by_source if experts is not None else None
    underserved = experts.underserved if experts is not None else ()
    del experts  # the outputs are large
    disconnect(tensors_of(block.module), groups, chosen)
    block.unrouted = {**block.unrouted, **unrouted(block.module, [planned])}
    if targets:
        kept = set(range(groups.count)) - set(chosen)
        compensate(block, groups, kept, targets, damping)
    return Disconnected(chosen, merged, by_source, scores, underserved, unprotected)


def unrouted(block: nn.Module, removed: Iterable[PlannedGroups]) -> dict[Tensor, Tensor]:
    """The masks (experts,) of experts whose outputs are zero, by the weights of their routers."""
    tensors, masks = tensors_of(block), dict[Tensor, Tensor]()
    for planned in removed:
        if planned.groups.routed:
            mask = disconnected(tensors, planned.groups)
            masks |= {
                router: mask.to(router.device) for router in routers_of(block, planned.groups)
            }
    return masks


def _readable(block: OpenBlock, groups: Groups, how: ExpertRemoval) -> RoutedExperts | None:
    """The experts on calibration tokens; None if only the effect of each can be known."""
    if how.choose is None:
        return None
    try:
        return RoutedExperts(block, groups, how.tokens)
    except AptError as error:
        for option, given in (("protect", how.protect), ("expert_tokens", how.tokens)):
            if given:
                raise AptError(error.message, "leave the option out", (option,)) from error
        if how.named:
            raise AptError(error.message, "leave the method out", ("method",)) from error
        return None


def _chosen(
    experts: RoutedExperts, groups: ColumnGroups, choose: ExpertChoice
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The experts that a choice removes, and the scores of all, if the choice has some."""
    scores = tuple[float, ...]()
    name = getattr(choose, "__name__", type(choose).__name__)
    try:
        if isinstance(choose, LowestScores):
            found = choose.scores(experts).cpu()
            mask, scores = lowest(found, groups, experts.protected), tuple(found.tolist())
        else:
            mask = choose(experts, groups)
        check_removed(mask, groups)
    except MethodError as error:
        raise faulty(f"method {name}", str(error), "method", "method") from error
    return tuple(mask.nonzero().squeeze(1).tolist()), scores


def _by_effect(block: OpenBlock, planned: PlannedGroups) -> tuple[int, ...]:
    """The groups without which the block's output changes least, each by itself."""
    groups = planned.groups
    losses = torch.zeros(groups.count)
    parameters = {path: p.detach() for path, p in block.module.named_parameters()}
    for batch in block.first_batches(_TOKENS):
        whole = stream_after(block, {}, batch, batch.state).float()
        for group in range(groups.count):
            paths = {part.path(group) for part in groups.outputs}
            without = {path: parameters[path].clone() for path in paths}
            disconnect(without, groups, [group])
            changed = stream_after(block, without, batch, batch.state).float()
            size = whole.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
            losses[group] += float(((whole - changed).square().sum(-1) / size).sum())
            block.progress()
    block.ranks.add(losses)
    pattern = ColumnGroups(groups.count, planned.kept, groups.bins)
    return tuple(pattern.lowest(losses).nonzero().squeeze(1).tolist())
