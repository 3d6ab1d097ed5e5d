"""The pruning of a model block by block, for whole runs and for programs."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from apt.adapter import Adapter
from apt.checkpoints.smaller import smaller_skeleton
from apt.engine.reports import calibration_of
from apt.engine.store import ModelStore
from apt.events import Event, ExpertsRemoved
from apt.output.report import Report
from apt.planning.allocation import Allocation, Unallocated, allocated, with_shares
from apt.planning.plan import Plan
from apt.planning.structure import make_structured_plan
from apt.plugin.specs import UNIFORM
from apt.pruning.layer import Recipe, SiteMethod
from apt.pruning.pipeline import prune_blocks
from apt.shrinking.record import candidate_records, removed_experts, structure_record
from apt.shrinking.structure_choice import StructureChoice
from apt.text.augmentation import Augmentation


@dataclass(frozen=True)
class Pruning:
    """The adapter, plan, method and settings for pruning one model.

    Attributes:
        augmentation: the calibration samples beside the given ones.
        allocation: the name and the function of an allocation; None keeps the plan's patterns.
        structure: the choice of the structure of a smaller model; None for a sparse one.
        seed: the seed for the text that the model generates.
        bos: the first token of every sample; None for no such token.
    """

    adapter: Adapter
    plan: Plan
    method: SiteMethod[Any]
    recipe: Recipe
    augmentation: Augmentation
    allocation: tuple[str, Allocation] | None = None
    structure: StructureChoice | None = None
    seed: int = 0
    bos: int | None = None
    special: tuple[int, ...] = ()

    @property
    def allocation_name(self) -> str:
        """The name of the allocation."""
        return self.allocation[0] if self.allocation else UNIFORM


def prune_model(
    store: ModelStore, tokens: Tensor, job: Pruning, report: Report
) -> tuple[Plan, Report]:
    """Generate text, distribute the sparsity, and prune block by block.

    Args:
        store: the model, pruned in place.
        tokens: calibration token ids (samples, seqlen).
        report: the report at the beginning of the run.

    Returns:
        The plan with the final patterns, and the report with the record of each site.
    """
    tokens = with_own_text(store, tokens, job)
    plan = final_plan(store, tokens, job)
    experts = list[ExpertsRemoved]()

    def observe(event: Event) -> None:
        store.observe(event)
        if isinstance(event, ExpertsRemoved):
            experts.append(event)

    sites = prune_blocks(
        store.model,
        job.adapter,
        plan,
        job.augmentation.with_random_tokens(store.model, tokens, job.special),
        job.method,
        job.recipe,
        block_storage=store,
        store=store.activations,
        ranks=store.ranks,
        observe=observe,
    )
    structure = {}
    if job.structure is not None:
        config = getattr(store.model, "config", None)
        structure = structure_record(job.structure.mode, plan, store.model, job.adapter, config)
        structure["experts"] = removed_experts(experts)
    return plan, replace(
        report,
        calibration=report.calibration | calibration_of(tokens),
        sites=sites,
        skipped=plan.dense,
        ranks=store.ranks.gather(store.ranks.work),
        structure=structure,
    )


def with_own_text(store: ModelStore, tokens: Tensor, job: Pruning) -> Tensor:
    """The given tokens (samples, seqlen) and those that the model generates."""

    def generate() -> Tensor:
        return job.augmentation.with_own_text(
            store.model, tokens, job.seed, bos=job.bos, special=job.special
        )

    return store.generated(generate) if job.augmentation.own_samples else tokens


def final_plan(store: ModelStore, tokens: Tensor, job: Pruning) -> Plan:
    """The plan with the structure or the sparsities that follow from the dense model."""
    plan = job.plan
    if job.structure is not None:
        with store.readable():
            plan = _structured(store, tokens, job) if store.ranks.first else plan
    elif job.allocation is not None and store.ranks.first:
        name, allocation = job.allocation
        store.status(f"distributing the sparsity ({name})")
        given = Unallocated(
            store.model, job.adapter, plan, tokens, store.open, job.recipe.error_aware
        )
        shares = store.journal.remember("shares", lambda: allocated(name, allocation, given))
        plan = with_shares(plan, name, shares)
    return store.ranks.share(plan)


def _structured(store: ModelStore, tokens: Tensor, job: Pruning) -> Plan:
    """The plan of a smaller model."""
    assert job.structure is not None
    model = store.model
    structure, scored = job.structure.choose(
        model, job.adapter, tokens, store.status, bos=job.bos, special=job.special
    )
    config = getattr(model, "config", None)
    plan = make_structured_plan(
        model, job.adapter, config, structure, adjusted=job.recipe.error_aware
    )
    smaller_skeleton(model, job.adapter, plan)  # raises if transformers has no model of these sizes
    return replace(plan, candidates=candidate_records(scored))
