"""The inputs of n:m sites that change places before the pruning."""

from dataclasses import replace
from typing import Any

from torch import nn

from apt.adapter import Adapter, Permutable
from apt.planning.plan import Plan, PlannedBlock


def with_permutable(plan: Plan, model: nn.Module, adapter: Adapter, config: Any) -> Plan:
    """The plan with the permutable inputs of its n:m sites.

    A site that stays dense keeps its bytes, so inputs that it shares do not change places.
    """
    modules = dict(adapter.blocks(model))
    blocks = list[PlannedBlock]()
    for planned in plan.blocks:
        has_n_m = any(entry.pattern.group for entry in planned.pruned if entry.pattern)
        available = adapter.permutable(modules[planned.name], config) if has_n_m else ()
        serving = tuple(permutable for permutable in available if _serves(permutable, planned))
        blocks.append(replace(planned, permutable=serving))
    return replace(plan, blocks=tuple(blocks))


def _serves(permutable: Permutable, planned: PlannedBlock) -> bool:
    """True if the reader has an n:m pattern that fits, and no part belongs to a dense site."""
    pattern = next((e.pattern for e in planned.sites if e.site.name == permutable.reader), None)
    sites = (entry.site for entry in planned.sites if entry.pattern is None)
    dense = {(site.parameter, site.expert) for site in sites}
    return (
        pattern is not None
        and pattern.group is not None
        and permutable.size % pattern.group == 0
        and not any((part.parameter, permutable.expert) in dense for part in permutable.parts)
    )
