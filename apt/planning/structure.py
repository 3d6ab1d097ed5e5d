"""The structure of a smaller model, and the plan of the run that makes it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from apt.adapter import Adapter, Groups, Site
from apt.adapter.groups import disconnected
from apt.errors import AptError
from apt.patterns import ColumnGroups, TargetForm
from apt.planning.plan import (
    Plan,
    PlannedBlock,
    PlannedGroups,
    PlannedSite,
    removed_by,
    shared_sites,
)

Removed = Mapping[str, Sequence[int]]
"""The indices of the removed groups of a block, by kind, or of the removed columns, by reader."""


@dataclass(frozen=True)
class Structure:
    """The parts of a model that are kept.

    Args:
        kept: the number of groups of each kind that every block keeps. Kinds that are not named
            keep all.
        dropped: the full names of the blocks that are dropped.
        removed: the removed groups of each block, by the block's name. For groups that are apart,
            the removed columns of each reader. Empty leaves the choice to the method.
    """

    kept: Mapping[str, int] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    removed: Mapping[str, Removed] = field(default_factory=dict)

    def groups(self, block: str, groups: Groups) -> ColumnGroups:
        """The pattern of the readers of ``groups`` in a block."""
        kept = self.kept.get(groups.kind, groups.count)
        return ColumnGroups(groups.count, kept, groups.bins, self._chosen(block, groups.kind))

    def columns(self, block: str, groups: Groups, reader: str) -> ColumnGroups:
        """The pattern of one reader of groups that are apart."""
        width = groups.columns_of(reader)
        kept = self.kept.get(groups.kind, groups.count) * width // groups.count
        return ColumnGroups(width, kept, chosen=self._chosen(block, reader))

    def _chosen(self, block: str, name: str) -> tuple[int, ...] | None:
        chosen = self.removed.get(block, {}).get(name)
        return None if chosen is None else tuple(chosen)


def make_structured_plan(
    model: nn.Module, adapter: Adapter, config: Any, structure: Structure, *, adjusted: bool = True
) -> Plan:
    """The plan of a run whose result has ``structure``; the model may be a skeleton.

    Args:
        adjusted: True if the sites that lose no columns are solved as well, to compensate for the
            errors before them. False leaves them as they are.

    Raises:
        AptError: two kinds of groups are removed from one site, or a site that several blocks share
            would become smaller.
    """
    blocks, shared = adapter.blocks(model), shared_sites(model, adapter)
    planned = tuple(
        PlannedBlock(name, (), dropped=True)
        if name in structure.dropped
        else _planned(adapter, config, name, block, structure, adjusted=adjusted)
        for name, block in blocks
    )
    return Plan(tuple(_with_shared(block, shared) for block in planned), shared)


def _with_shared(block: PlannedBlock, shared: Collection[str]) -> PlannedBlock:
    """The block without changes of the sites that several blocks use."""
    entries = [entry for entry in block.sites if entry.name in shared]
    for entry in entries:
        if removed_by(entry.pattern, entry.shape):
            message = f"{entry.name} cannot become smaller: several blocks use its weight"
            raise AptError(message, "drop blocks instead", ("depth_only",))
    return block.with_patterns({entry.site.name: None for entry in entries})


def _planned(
    adapter: Adapter,
    config: Any,
    name: str,
    block: nn.Module,
    structure: Structure,
    *,
    adjusted: bool,
) -> PlannedBlock:
    patterns, tied = dict[str, ColumnGroups](), list[tuple[str, ...]]()
    smaller = list[PlannedGroups]()
    for groups in adapter.groups(block, config):
        pattern = structure.groups(name, groups)
        if not pattern.removed:
            continue
        smaller.append(PlannedGroups(groups, pattern.kept, pattern.chosen))
        for reader in groups.readers:
            if reader in patterns:
                raise AptError(f"{name}.{reader} cannot lose groups of two kinds")
            patterns[reader] = pattern
            if groups.apart:
                patterns[reader] = structure.columns(name, groups, reader)
        if pattern.chosen is None and len(groups.readers) > 1 and not groups.apart:
            tied.append(groups.readers)
    planned = []
    for site in adapter.sites(block):
        rows, width = site.oriented(site.weight(block)).shape
        unchanged = ColumnGroups(1, 1) if adjusted and not site.routed else None
        columns = patterns.get(site.name, unchanged)
        form = None if columns is None else TargetForm(columns)
        planned.append(PlannedSite(f"{name}.{site.name}", site, (rows, width), form))
    return PlannedBlock(name, tuple(planned), groups=tuple(smaller), tied=tuple(tied))


def removed_groups(block: nn.Module, planned: PlannedBlock) -> Removed:
    """The first groups on which a block's output does not depend, as many as planned."""
    sites: dict[str, Site] = {entry.site.name: entry.site for entry in planned.sites}
    parameters, removed = dict(block.named_parameters()), dict[str, tuple[int, ...]]()
    for groups, kept in ((entry.groups, entry.kept) for entry in planned.groups):
        pattern = ColumnGroups(groups.count, kept, groups.bins)
        empty = disconnected(parameters, groups)
        for reader in groups.readers:
            site = sites[reader]
            empty &= pattern.zeros(site.oriented(site.weight(block).detach())).cpu()
        scores = torch.where(empty, 0.0, 1.0)
        removed[groups.kind] = tuple(pattern.lowest(scores).nonzero().squeeze(1).tolist())
    return removed
