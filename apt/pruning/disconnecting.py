"""The removal of groups without readers: states of a scan, and experts.

No matrix multiplies the outputs of these groups. So groups are chosen by the change of the block's
output. While the block is pruned, the outputs of removed groups are zero, and its router does not
choose removed experts.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apt.adapter import Groups
from apt.adapter.groups import disconnect, disconnected, tensors_of
from apt.calibration.batches import OpenBlock
from apt.calibration.sources import RoutedBySource
from apt.errors import AptError, plugin_error
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
        chosen: the indices of the removed groups.
        merged: pairs of a removed expert and the kept expert that it was merged into.
        by_source: the tokens of each expert by source; None if the routing is not known.
        scores: the scores (experts,) of the choice; empty if it has none.
        underserved: the experts with fewer tokens than the least number.
        unprotected: the experts that a protected source needs, and that had no place among the kept
            experts.
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
    removal: ExpertRemoval,
    damping: float | None,
    judged: OpenBlock | None = None,
) -> Disconnected:
    """Choose groups, and set their outputs to zero; see `ExpertRemoval` for experts.

    Args:
        judged: the block with the batches on which experts are judged; by default ``block``.
    """
    groups, chosen, merged = planned.groups, planned.chosen, tuple[tuple[int, int], ...]()
    routed = _routed_experts(judged or block, groups, removal) if groups.routed else None
    pattern = ColumnGroups(groups.count, planned.kept, groups.bins)
    scores, unprotected = tuple[float, ...](), tuple[int, ...]()
    if routed is not None and removal.protect:
        places = [block.sources.index(name) for name in removal.protect]
        weights = [routed.by_source.weights[place] for place in places]
        routed.protected, unprotected = protected_experts(weights, pattern)
    if chosen is None and routed is not None and removal.choose is not None:
        chosen, scores = _chosen_experts(routed, pattern, removal.choose)
    if chosen is not None and routed is not None:
        mask = with_protected(pattern.mask(chosen), routed, pattern)
        chosen = tuple(mask.nonzero().squeeze(1).tolist())
    chosen = tuple(block.ranks.share(chosen or _groups_of_least_effect(block, planned)))
    targets = dense_outputs(block, groups) if routed is not None and removal.compensate else []
    if routed is not None and removal.merge:
        removed = pattern.mask(chosen)
        merged = merge_experts(block.module, block.adapter, groups, routed, removed)
    by_source = routed.by_source if routed is not None else None
    underserved = routed.underserved if routed is not None else ()
    del routed  # the outputs are large
    disconnect(tensors_of(block.module), groups, chosen)
    block.unrouted = {**block.unrouted, **unrouted_experts(block.module, [planned])}
    if targets:
        kept = set(range(groups.count)) - set(chosen)
        compensate(block, groups, kept, targets, damping)
    return Disconnected(chosen, merged, by_source, scores, underserved, unprotected)


def unrouted_experts(block: nn.Module, removed: Iterable[PlannedGroups]) -> dict[Tensor, Tensor]:
    """The masks (experts,) of experts whose outputs are zero, by the weights of their routers."""
    tensors, masks = tensors_of(block), dict[Tensor, Tensor]()
    for planned in removed:
        if planned.groups.routed:
            mask = disconnected(tensors, planned.groups)
            masks |= {
                router: mask.to(router.device) for router in routers_of(block, planned.groups)
            }
    return masks


def _routed_experts(
    block: OpenBlock, groups: Groups, removal: ExpertRemoval
) -> RoutedExperts | None:
    """The experts on calibration tokens; None if they are chosen by their effects alone."""
    if removal.choose is None:
        return None
    try:
        return RoutedExperts(block, groups, removal.tokens)
    except AptError as error:
        for option, value in (("protect", removal.protect), ("expert_tokens", removal.tokens)):
            if value:
                raise AptError(error.message, "leave the option out", (option,)) from error
        if removal.named:
            raise AptError(error.message, "leave the method out", ("method",)) from error
        return None


def _chosen_experts(
    experts: RoutedExperts, groups: ColumnGroups, choose: ExpertChoice
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The experts that a choice removes, and the scores of all experts, if it computes scores."""
    scores = tuple[float, ...]()
    name = getattr(choose, "__name__", type(choose).__name__)
    try:
        if isinstance(choose, LowestScores):
            values = choose.scores(experts).cpu()
            mask, scores = lowest(values, groups, experts.protected), tuple(values.tolist())
        else:
            mask = choose(experts, groups)
        check_removed(mask, groups)
    except MethodError as error:
        raise plugin_error(f"method {name}", str(error), "method", "method") from error
    return tuple(mask.nonzero().squeeze(1).tolist()), scores


def _groups_of_least_effect(block: OpenBlock, planned: PlannedGroups) -> tuple[int, ...]:
    """The groups whose removal, each by itself, changes the block's output least."""
    groups = planned.groups
    losses = torch.zeros(groups.count)
    parameters = {path: p.detach() for path, p in block.module.named_parameters()}
    for batch in block.first_batches(_TOKENS):
        stream = stream_after(block, {}, batch.state, batch.calls[block.index]).float()
        for group in range(groups.count):
            paths = {part.path(group) for part in groups.outputs}
            disconnected_outputs = {path: parameters[path].clone() for path in paths}
            disconnect(disconnected_outputs, groups, [group])
            call = batch.calls[block.index]
            changed_stream = stream_after(block, disconnected_outputs, batch.state, call).float()
            squares = stream.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
            losses[group] += float(((stream - changed_stream).square().sum(-1) / squares).sum())
            block.progress()
    block.ranks.add(losses)
    pattern = ColumnGroups(groups.count, planned.kept, groups.bins)
    return tuple(pattern.lowest(losses).nonzero().squeeze(1).tolist())
