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
    """The kept and the removed parts of a smaller model, and the candidates of its choice."""
    sizes = Sizes(model, adapter, config, 1)
    kept = dict[str, int]()
    for planned in plan.blocks:
        kept |= planned.kept
    size = sizes.size(kept, len(plan.blocks) - len(plan.dropped))
    skeleton = smaller_skeleton(model, adapter, plan)
    counts = group_counts(skeleton, adapter, skeleton.config)
    return {
        "mode": mode,
        "share": size.share,
        "blocks": {"kept": size.blocks, "of": len(plan.blocks), "dropped": plan.dropped},
        "groups": {
            kind: {"kept": counts.get(kind, size.kept.get(kind, groups.count)), "of": groups.count}
            for kind, groups in sizes.groups.items()
        },
        "candidates": list(plan.candidates),
    }


def removed_experts(removed: Sequence[ExpertsRemoved]) -> dict[str, dict[str, Any]]:
    """The removed experts of each block, and the pairs of merged experts.

    Scores, underserved and unprotected experts are there if there are any.
    """
    return {
        record.name: {
            "removed": list(record.experts),
            "merged": [list(pair) for pair in record.merged],
        }
        | {
            name: list(values)
            for name in ("scores", "underserved", "unprotected")
            if (values := getattr(record, name))
        }
        for record in removed
    }


def group_counts(model: nn.Module, adapter: Adapter, config: Any) -> dict[str, int]:
    """The number of groups of each kind in the blocks of a model, which may be a skeleton.

    A smaller model may have fewer kinds: if each key/value head has one head, both are one kind.
    If a key/value head is removed, its heads are removed too.
    """
    blocks = (block for _, block in adapter.blocks(model))
    return {g.kind: g.count for block in blocks for g in adapter.groups(block, config)}


def candidate_records(scored: Sequence[Scored]) -> tuple[dict[str, Any], ...]:
    """All candidates by increasing loss, with marks for the Pareto front of cost and loss."""
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
