"""Pruning a model whose weights are there: the part of a run that changes weights.

The command line and `apt.prune` come together here.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from apt.adapter import Adapter
from apt.calibration.storage import Store
from apt.distributed.ranks import Ranks
from apt.events import Observer, SitePruned
from apt.planning.allocation import Allocation, allocated
from apt.planning.plan import Plan
from apt.pruning.block_storage import BlockStorage
from apt.pruning.layer import Method
from apt.pruning.pipeline import prune_blocks
from apt.pruning.recipe import Recipe
from apt.text.augmentation import Augmentation


@dataclass(frozen=True)
class Job:
    """What is to be done to a model.

    Attributes:
        adapter: the adapter of its family.
        plan: what to do to each site.
        method: the pruning method.
        recipe: how it is applied.
        augmentation: the calibration samples beside those that are given.
        allocation: the name and the function that share out a sparsity; None keeps the plan's.
        seed: draws the text that the model writes.
        bos: the token that every sample begins with; None for none.
        special: tokens that are no text; None for those that the model's configurations name.
    """

    adapter: Adapter
    plan: Plan
    method: Method
    recipe: Recipe
    augmentation: Augmentation
    allocation: tuple[str, Allocation] | None = None
    seed: int = 0
    bos: int | None = None
    special: tuple[int, ...] = ()

    def with_own_text(self, model: nn.Module, tokens: Tensor, ranks: Ranks) -> Tensor:
        """The given tokens and those that the model writes, the same on all ranks."""
        if ranks.first:
            tokens = self.augmentation.with_own_text(
                model, tokens, self.seed, bos=self.bos, special=self.special
            )
        return ranks.share(tokens)


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
) -> tuple[Plan, list[SitePruned]]:
    """Share out the sparsity, add samples with random tokens, and prune block by block.

    Args:
        model: the model, pruned in place.
        tokens: calibration token ids (samples, seqlen), with those that the model has written.
        job: what is to be done.
        block_storage, store: where blocks and activations are meanwhile, see `prune_blocks`.
        ranks: the processes that do this together.
        observe: called with each event.
        status: told what is being done outside the loop over blocks.

    Returns:
        The plan as it was carried out, and the record of each site.
    """
    plan = job.plan
    if job.allocation is not None:
        name, allocation = job.allocation
        status(f"sharing out the sparsity ({name})")
        plan = ranks.share(allocated(plan, name, allocation, model, job.adapter, tokens))
    tokens = job.augmentation.with_random_tokens(model, tokens, job.special)
    sites = prune_blocks(
        model,
        job.adapter,
        plan,
        tokens,
        job.method,
        job.recipe,
        block_storage=block_storage,
        store=store,
        ranks=ranks,
        observe=observe,
    )
    return plan, sites
