"""The record of the structure of a smaller model, for the report."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from apt.adapter import Adapter
from apt.checkpoints.smaller import smaller_skeleton
from apt.events import ExpertsRemoved
from apt.options import Mode
from apt.planning.plan import Plan
from apt.shrinking.search import Scored, pareto_front
from apt.shrinking.sizes import Sizes


def structure_record(
    mode: Mode, plan: Plan, model: nn.Module, adapter: Adapter, config: Any
) -> dict[str, Any]:
    """What a smaller model keeps and lacks, and the candidates that it was chosen from."""
    sizes = Sizes(model, adapter, config, 1)
    kept = dict[str, int]()
    for planned in plan.blocks:
        kept |= planned.kept
    size = sizes.size(kept, len(plan.blocks) - len(plan.dropped))
    empty = smaller_skeleton(model, adapter, plan)
    left = group_counts(empty, adapter, empty.config)
    return {
        "mode": mode,
        "share": size.share,
        "blocks": {"kept": size.blocks, "of": len(plan.blocks), "dropped": plan.dropped},
        "groups": {
            kind: {"kept": left.get(kind, size.kept.get(kind, groups.count)), "of": groups.count}
            for kind, groups in sizes.groups.items()
        },
        "candidates": list(plan.candidates),
    }


def removed_experts(removed: Sequence[ExpertsRemoved]) -> dict[str, dict[str, Any]]:
    """The removed experts of each block, and for the merged ones those that they are a part of.

    Scores, underserved and unprotected experts are there if there are any.
    """
    return {
        each.name: {"removed": list(each.experts), "merged": [list(pair) for pair in each.merged]}
        | {
            name: list(values)
            for name in ("scores", "underserved", "unprotected")
            if (values := getattr(each, name))
        }
        for each in removed
    }


def group_counts(model: nn.Module, adapter: Adapter, config: Any) -> dict[str, int]:
    """The number of groups of each kind in the blocks of a model, which may have no weights.

    A smaller model may have fewer kinds: if each key/value head has one head, they are one kind.
    And if a key/value head is removed, its heads go with it.
    """
    blocks = (block for _, block in adapter.blocks(model))
    return {g.kind: g.count for block in blocks for g in adapter.groups(block, config)}


def candidate_records(scored: Sequence[Scored]) -> tuple[dict[str, Any], ...]:
    """All candidates, those of lowest loss first, and the Pareto front of cost and loss."""
    front = pareto_front(scored, lambda candidate: candidate.size.cost)
    return tuple(
        {
            "loss": entry.loss,
            "share": entry.candidate.size.share,
            "cost": entry.candidate.size.cost,
            "blocks": entry.candidate.size.blocks,
            "groups": dict(entry.candidate.size.kept),
            "dropped": sorted(entry.candidate.dropped),
            "front": entry in front,
        }
        for entry in scored
    )
