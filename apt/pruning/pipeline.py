"""The loop over blocks: capture, solve, write back, propagate."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, State
from apt.adapter.recording import eval_mode
from apt.calibration.batches import TOKENS_PER_BATCH, Batch, check_finite, enter
from apt.calibration.storage import MemoryStore, Store
from apt.distributed.ranks import Ranks
from apt.errors import AptError
from apt.events import BlockStarted, Done, Observer, SitePruned, Working
from apt.planning.plan import Plan, PlannedBlock
from apt.pruning.block_store import BlockStore
from apt.pruning.current_block import CurrentBlock, Dropped
from apt.pruning.disconnecting import unrouted
from apt.pruning.layer import Recipe, SiteMethod, SiteSolver
from apt.text.ids import check_ids


@torch.inference_mode(mode=False)  # the caller's inference mode would rule out gradients
@torch.no_grad()
def prune_blocks(
    model: nn.Module,
    adapter: Adapter,
    plan: Plan,
    tokens: Tensor,
    method: SiteMethod[Any],
    recipe: Recipe | None = None,
    *,
    block_storage: BlockStore | None = None,
    store: Store | None = None,
    ranks: Ranks | None = None,
    observe: Observer = lambda event: None,
) -> list[SitePruned]:
    """Prune ``model`` in place, one block after the other.

    Each block is run with its dense weights on the outputs of the pruned blocks before it. Its
    sites are solved from the Gram matrices of their inputs and written back, and the block is run
    again. If the sites are solved in order, it is run again for each stage of them, and products of
    the runs before are stored. With error-aware targets, the activations of the dense model are
    computed as well.

    Args:
        model: the model; it is set to eval mode during the run.
        plan: the pattern of each site, from `apt.planning.plan.make_plan`.
        tokens: calibration token ids (samples, seqlen).
        recipe: the options; the default is layer-wise.
        block_storage: the store of the blocks; None if all are in memory.
        store: the store of the activations between runs of blocks; None keeps them in memory. If
            they leave the model's device, products are not stored either, and all of a block is run
            again for each stage of sites that is solved in order.
        ranks: the processes that prune together; None for a single one. Each of them calls this
            function with the same arguments and ends with the same model.

    Raises:
        AptError: the tokens have another shape, activations are not finite, a site's inputs were
            not captured, or a solve failed.
    """
    check_ids(tokens)
    solver = SiteSolver(method, recipe or Recipe())
    storage, store = block_storage or BlockStore(), store or MemoryStore()
    run = _Pruning(adapter, solver, storage, store, ranks or Ranks(), observe)
    with eval_mode(model), adapter.running(model):
        return run.prune_all(model, plan, tokens)


@dataclass
class _Pruning:
    adapter: Adapter
    solver: SiteSolver
    block_storage: BlockStore
    store: Store
    ranks: Ranks
    observe: Observer
    tuning_batches: int = 0  # the number of batches for tuning, which are the first ones

    def prune_all(self, model: nn.Module, plan: Plan, tokens: Tensor) -> list[SitePruned]:
        modules = dict(self.adapter.blocks(model))
        batches = self.enter(model, tokens)
        done: list[Done] = []
        kept = [index for index, planned in enumerate(plan.blocks) if not planned.dropped]
        blocks = [(i, name, module) for i, (name, module) in enumerate(modules.items())]
        self.pass_dropped(batches, blocks[: kept[0]])
        for index, following in pairwise([*kept, len(plan.blocks)]):
            planned, dropped = plan.blocks[index], blocks[index + 1 : following]
            self.observe(BlockStarted(planned.name, index, len(plan.blocks)))
            module = modules[planned.name]
            with self.block_storage.open(planned.name, module):
                done += self.prune_opened(  # no name keeps the block and its copies alive
                    self.current(planned, module, index, batches, dropped), last=index == kept[-1]
                )
        return [record for record in done if isinstance(record, SitePruned)]

    def current(
        self,
        planned: PlannedBlock,
        module: nn.Module,
        index: int,
        batches: list[Batch],
        dropped: Sequence[Dropped],
    ) -> CurrentBlock:
        progress = partial(self.observe, Working(planned.name, "running"))
        return CurrentBlock(
            self.adapter, module, index, batches, self.ranks, progress,
            planned=planned, dropped=dropped, solver=self.solver, observe=self.observe,
            pass_dropped=partial(self.pass_dropped, batches), tuning_batches=self.tuning_batches,
            stores_products=self.store.with_model, storage=self.block_storage,
        )  # fmt: skip

    def prune_opened(self, current: CurrentBlock, *, last: bool) -> list[Done]:
        """Prune or restore a block that is in memory, and run it unless it is the last one."""
        try:
            done = self.prune_or_restore(current)
            if not last:
                check_finite(self.adapter, self.propagated(current), self.ranks)
        except AptError as error:
            name = current.planned.name
            raise AptError(f"in {name}: {error.message}", error.hint, error.options) from error
        return done

    def prune_or_restore(self, current: CurrentBlock) -> list[Done]:
        """Prune a block, or restore it if an earlier run has pruned it."""
        name = current.planned.name
        if (known := self.block_storage.kept(name)) is None:
            known = current.prune()
            self.block_storage.keep(name, current.module, known)
            return known
        for batch in current.batches:
            if batch.dense is not None:
                batch.dense.state = current.step(batch, batch.dense.state)
                current.progress()
        self.pass_dropped(current.batches, current.dropped)
        self.block_storage.read_kept(name, current.module)
        current.unrouted = unrouted(current.module, current.planned.disconnected)
        for record in known:
            self.observe(record)
        return known

    def pass_dropped(self, batches: list[Batch], dropped: Sequence[Dropped]) -> None:
        """Run dropped blocks on the dense stream; the pruned stream does not pass them."""
        for index, name, module in dropped if self.solver.recipe.error_aware else ():
            with self.block_storage.open(name, module):
                for batch in batches:
                    assert batch.dense is not None
                    state, call = batch.dense.state, batch.calls[index]
                    batch.dense.state = self.adapter.step(module, state, call)
                    self.observe(Working(name, "running"))

    def enter(self, model: nn.Module, tokens: Tensor) -> list[Batch]:
        """This rank's batches before the first block; smaller ones for tuning come first."""
        how, batches, rest = self.solver.recipe.tuning, list[Batch](), tokens
        if how is not None:
            chosen = how.chosen(*tokens.shape)
            size = how.step_tokens(int(chosen.sum()), tokens.shape[1])
            batches = self.batches(model, tokens[chosen], size)
            self.tuning_batches, rest = len(batches), tokens[~chosen]
        if len(rest):
            batches += self.batches(model, rest, TOKENS_PER_BATCH)
        if self.ranks.sum(not batches):
            fault = f"too few samples: some of {self.ranks.size} ranks have none"
            raise AptError(fault, "give more samples, or start fewer ranks", ("samples",))
        self.ranks.work.tokens = sum(batch.tokens for batch in batches)
        return batches

    def batches(self, model: nn.Module, tokens: Tensor, size: int) -> list[Batch]:
        """This rank's batches, of about ``size`` tokens, from ``tokens`` (samples, seqlen)."""
        size = min(size, math.ceil(len(tokens) / self.ranks.size) * tokens.shape[1])
        aware = self.solver.recipe.error_aware
        return enter(
            self.adapter, model, tokens, size, with_dense=aware, ranks=self.ranks, store=self.store
        )

    def propagated(self, current: CurrentBlock) -> Iterator[State]:
        """The output of the pruned block for each batch, which becomes its state."""
        for batch in current.batches:
            if not current.propagated:
                batch.state = current.step(batch, batch.state)
                current.progress()
            yield batch.state
