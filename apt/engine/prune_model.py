"""The part of a run that changes weights, common to the command line and `apt.prune`."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from apt.adapter import Adapter
from apt.calibration.storage import Store
from apt.checkpoints.smaller import empty_smaller
from apt.distributed.ranks import Ranks
from apt.events import Observer, SitePruned
from apt.planning.allocation import (
    UNIFORM,
    Allocation,
    Unallocated,
    allocated,
    is_needed,
    with_shares,
)
from apt.planning.plan import Plan
from apt.planning.structure import make_structured_plan
from apt.plugin.registry import Registry
from apt.pruning.block_storage import BlockStorage, MemoryBlocks
from apt.pruning.layer import Recipe, SiteMethod
from apt.pruning.pipeline import prune_blocks
from apt.shrinking.structure_choice import StructureChoice
from apt.text.augmentation import Augmentation

Remember = Callable[[str, Callable[[], Any]], Any]
"""A function of a key and a computation that returns the result, computed or known already."""


@dataclass(frozen=True)
class Job:
    """The adapter, plan, method and settings for pruning one model.

    Attributes:
        adapter: the adapter of the model's family.
        plan: the pattern of each site.
        method: the pruning method.
        recipe: the settings of the method.
        augmentation: the calibration samples beside the given ones.
        allocation: the name and the function of an allocation; None keeps the plan's patterns.
        structure: the choice of the structure of a smaller model; None for a sparse one.
        seed: the seed for the text that the model generates.
        bos: the first token of every sample; None for no such token.
        special: the special tokens.
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

    def with_own_text(self, model: nn.Module, tokens: Tensor, ranks: Ranks) -> Tensor:
        """The given tokens and those that the model generates, the same on all ranks."""
        if ranks.first:
            tokens = self.augmentation.with_own_text(
                model, tokens, self.seed, bos=self.bos, special=self.special
            )
        return ranks.share(tokens)


def named_allocation(name: str, plan: Plan, registry: Registry) -> tuple[str, Allocation] | None:
    """The allocation with this name and its function; None if the plan's patterns are final."""
    spec = registry.allocations.get(name)
    return (spec.name, spec.load()) if is_needed(spec.name, plan) else None


def prune_model(
    model: nn.Module,
    tokens: Tensor,
    job: Job,
    *,
    block_storage: BlockStorage | None = None,
    store: Store | None = None,
    ranks: Ranks,
    observe: Observer,
    status: Callable[[str], None] = lambda line: None,
    readable: Callable[[], AbstractContextManager[None]] = nullcontext,
    remember: Remember = lambda key, compute: compute(),
) -> tuple[Plan, list[SitePruned]]:
    """Distribute the sparsity, add samples with random tokens, and prune block by block.

    Args:
        model: the model, pruned in place.
        tokens: calibration token ids (samples, seqlen), with those that the model has generated.
        job: the adapter, plan, method and settings.
        block_storage, store: the places of blocks and activations, see `prune_blocks`.
        ranks: the processes that prune together.
        observe: called with each event.
        status: called with a text for each step outside the loop over blocks.
        readable: a context in which the whole dense model can run.
        remember: returns a value that an interrupted run has computed, or computes it.

    Returns:
        The plan with the final patterns, and the record of each site.
    """
    plan, blocks = job.plan, block_storage or MemoryBlocks()
    if job.structure is not None:
        with readable():
            plan = _structured(model, tokens, job, status) if ranks.first else plan
    elif job.allocation is not None and ranks.first:
        name, allocation = job.allocation
        status(f"distributing the sparsity ({name})")
        aware = job.recipe.targets is not None
        given = Unallocated(model, job.adapter, plan, tokens, blocks.open, aware)
        shares = remember("shares", lambda: allocated(name, allocation, given))
        plan = with_shares(plan, name, shares)
    plan = ranks.share(plan)
    tokens = job.augmentation.with_random_tokens(model, tokens, job.special)
    sites = prune_blocks(
        model,
        job.adapter,
        plan,
        tokens,
        job.method,
        job.recipe,
        block_storage=blocks,
        store=store,
        ranks=ranks,
        observe=observe,
    )
    return plan, sites


def _structured(model: nn.Module, tokens: Tensor, job: Job, status: Callable[[str], None]) -> Plan:
    """The plan of a smaller model."""
    assert job.structure is not None
    structure = job.structure.choose(
        model, job.adapter, tokens, status, bos=job.bos, special=job.special
    )
    config = getattr(model, "config", None)
    adjusted = job.recipe.targets is not None
    plan = make_structured_plan(model, job.adapter, config, structure, adjusted=adjusted)
    empty_smaller(model, job.adapter, plan)  # raises if transformers has no model of these sizes
    return plan
