"""The pruning of a model block by block, for whole runs and for programs."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from apt.checkpoints.smaller import smaller_skeleton
from apt.engine.reports import calibration_of
from apt.engine.store import ModelStore
from apt.engine.text import Text
from apt.events import Done, ExpertsRemoved, SitePruned
from apt.output.report import Report
from apt.planning.allocation import Allocation, Unallocated, allocated, with_shares
from apt.planning.plan import Plan
from apt.planning.structure import make_structured_plan
from apt.plugin.specs import UNIFORM
from apt.pruning.layer import BlockPruning
from apt.pruning.pipeline import prune_blocks
from apt.shrinking.record import candidate_records, removed_experts, structure_record
from apt.shrinking.structure_choice import StructureChoice
from apt.text.augmentation import Augmentation


@dataclass(frozen=True)
class Pruning(BlockPruning):
    """The pruning of one model: its options with all values filled in.

    Attributes:
        augmentation: the calibration samples beside the given ones.
        allocation: the name and the function of an allocation; None keeps the plan's patterns.
        structure: the choice of the structure of a smaller model; None for a sparse one.
        seed: the seed for the text that the model generates.
    """

    augmentation: Augmentation
    allocation: tuple[str, Allocation] | None = None
    structure: StructureChoice | None = None
    seed: int = 0

    @property
    def allocation_name(self) -> str:
        """The name of the allocation."""
        return self.allocation[0] if self.allocation else UNIFORM


def decide(store: ModelStore, text: Text, job: Pruning) -> tuple[Text, Plan]:
    """What follows from the dense model: the text with that of the model, and the final plan."""
    text = with_own_text(store, text, job)
    return text, final_plan(store, text, job)


def prune_model(store: ModelStore, text: Text, job: Pruning, report: Report) -> Report:
    """Prune block by block, on the text and by the plan of `decide`.

    Args:
        store: the model, pruned in place.
        report: the report at the beginning of the run.

    Returns:
        The report with the record of each site.
    """
    tokens = job.augmentation.with_random_tokens(store.model, text.tokens, text.special)
    done, structure = list[Done](), dict[str, Any]()
    if job.recipe.error_aware or any(block.changes for block in job.plan.blocks):
        done = prune_blocks(store, job, tokens)
    if job.structure is not None:
        config = getattr(store.model, "config", None)
        structure = structure_record(job.structure.mode, job.plan, store.model, job.adapter, config)
        removed = [one for one in done if isinstance(one, ExpertsRemoved)]
        structure["experts"] = removed_experts(removed)
    return replace(
        report,
        calibration=report.calibration | calibration_of(text.tokens),
        sites=[one for one in done if isinstance(one, SitePruned)],
        skipped=job.plan.dense,
        ranks=store.ranks.gather(store.ranks.work),
        structure=structure,
    )


def with_own_text(store: ModelStore, text: Text, job: Pruning) -> Text:
    """A text with the samples that the model generates."""

    def generate() -> Tensor:
        return job.augmentation.with_own_text(
            store.model, text.tokens, job.seed, bos=text.bos, special=text.special
        )

    own = job.augmentation.own_samples
    return replace(text, tokens=store.generated(generate)) if own else text


def final_plan(store: ModelStore, text: Text, job: Pruning) -> Plan:
    """The plan with the structure or the sparsities that follow from the dense model."""
    plan = job.plan
    if job.structure is not None:
        with store.readable():
            plan = _structured(store, text, job) if store.ranks.first else plan
    elif job.allocation is not None and store.ranks.first:
        name, allocation = job.allocation
        store.status("allocation", f"distributing the sparsity ({name})")
        given = Unallocated(
            store.model, job.adapter, plan, text.tokens, store.open, job.recipe.error_aware
        )
        shares = store.journal.remember("shares", lambda: allocated(name, allocation, given))
        plan = with_shares(plan, name, shares)
    return store.ranks.share(plan)


def _structured(store: ModelStore, text: Text, job: Pruning) -> Plan:
    """The plan of a smaller model."""
    assert job.structure is not None
    model = store.model
    structure, scored = job.structure.choose(
        model, job.adapter, text.tokens, partial(store.status, "structure"),
        bos=text.bos, special=text.special,
    )  # fmt: skip
    config = getattr(model, "config", None)
    plan = make_structured_plan(
        model, job.adapter, config, structure, adjusted=job.recipe.error_aware
    )
    smaller_skeleton(model, job.adapter, plan)  # raises if transformers has no model of these sizes
    return replace(plan, candidates=candidate_records(scored))
