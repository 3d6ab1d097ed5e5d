"""The loop over blocks: capture, solve, write back, propagate."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Samples, State
from apt.adapter.groups import disconnect, tensors_of
from apt.adapter.recording import eval_mode
from apt.calibration.batches import (
    TOKENS_PER_BATCH,
    Batch,
    OpenBlock,
    check_finite,
    enter,
    enter_next,
)
from apt.calibration.sources import SampleSources
from apt.errors import AptError
from apt.events import BlockRecord, BlockStarted, ExpertsRemoved, Working
from apt.planning.plan import PlannedGroups
from apt.pruning.block_store import BlockStore
from apt.pruning.current_block import CurrentBlock, pass_dropped
from apt.pruning.disconnecting import unrouted_experts
from apt.pruning.layer import BlockPruning
from apt.pruning.routed_experts import batches_to_judge
from apt.text.ids import check_ids


@torch.inference_mode(mode=False)  # the caller's inference mode would rule out gradients
@torch.no_grad()
def prune_blocks(
    store: BlockStore,
    job: BlockPruning,
    tokens: Tensor | Samples,
    sources: SampleSources | None = None,
) -> list[BlockRecord]:
    """Prune a model in place, one block after the other.

    Each block is run with its dense weights on the outputs of the pruned blocks before it. Its
    sites are solved from the Gram matrices of their inputs and written back, and the block is run
    again. If the sites are solved in order, the block is run again for each stage of sites, and the
    products of earlier runs are stored. With error-aware targets, the activations of the dense
    model are computed as well.

    Args:
        store: the model; it is in eval mode during the run. Each rank calls this function with the
            same arguments and ends with the same model.
        job: what is done to the blocks.
        tokens: calibration token ids (samples, seqlen), or other samples.
        sources: their sources; None for one source.

    Returns:
        The records of all blocks.

    Raises:
        AptError: the tokens have another shape, activations are not finite, a site's inputs were
            not captured, or a solve failed.
    """
    if isinstance(tokens, Tensor):
        check_ids(tokens)
    sources = sources or SampleSources.one(len(tokens))
    model, adapter, planned = store.model, job.adapter, job.plan.blocks
    with eval_mode(model), adapter.running(model):
        # 1. The inputs of the first block, in batches; batches for tuning come first.
        batches, tuning = _entered_batches(store, job, tokens, sources)
        judged = _judged_batches(store, job, batches, sources) if job.recipe.experts.dense else []
        blocks = [(i, name, module) for i, (name, module) in enumerate(adapter.blocks(model))]
        done: list[BlockRecord] = []
        for start, end in stack_bounds(adapter, model):
            # 2. A later stack begins with what the model passes on from the earlier ones. The dense
            #    stream passes the dropped blocks before the first kept block.
            if start:
                outer = partial(_exchanged, model, store.dense_outer)
                enter_next(adapter, model, [*batches, *judged], outer)
            kept = [index for index in range(start, end) if not planned[index].dropped]
            pass_dropped(store, job, batches, blocks[start : kept[0] if kept else end])
            # 3. Each kept block, with the dropped blocks behind it.
            for index, following in pairwise([*kept, end] if kept else []):
                _, name, module = blocks[index]
                store.observe(BlockStarted(name, index, len(planned)))
                with store.open(name, module):
                    done += _prune_opened(  # no name keeps the block and its copies alive
                        CurrentBlock(
                            adapter, module, index, batches, store.ranks,
                            partial(store.observe, Working(name, "running")),
                            store=store, job=job, planned=store.planned(planned[index]),
                            dropped=blocks[index + 1 : following], tuning_batches=tuning,
                            sources=sources.names, mixed=sources.mixed, judged=judged,
                        ), last=index == kept[-1] and end == len(blocks)
                    )  # fmt: skip
    return done


def stack_bounds(adapter: Adapter, model: nn.Module) -> list[tuple[int, int]]:
    """The indices of the first block of each stack, and of the block behind its last one."""
    ends = [0, *accumulate(len(blocks) for _, blocks in adapter.stacks(model))]
    return list(pairwise(ends))


@torch.no_grad()
def remove_chosen(store: BlockStore, job: BlockPruning) -> list[BlockRecord]:
    """Remove the groups that the plan names, without calibration; the other weights stay.

    Returns:
        The records of all blocks.
    """
    done, scores = list[BlockRecord](), job.recipe.experts.scores
    modules = dict(job.adapter.blocks(store.model))
    for index, planned in enumerate(job.plan.blocks):
        name, module = planned.name, modules[planned.name]
        store.observe(BlockStarted(name, index, len(job.plan.blocks)))
        if (records := store.kept(name)) is None:
            with store.open(name, module):
                records = [_remove(module, name, lost, scores) for lost in planned.disconnected]
                store.keep(name, module, records)
        for record in records:
            store.observe(record)
        done += records
    return done


def _remove(
    module: nn.Module, name: str, lost: PlannedGroups, scores: Mapping[str, Sequence[float]]
) -> BlockRecord:
    """Set the outputs of the groups that a plan names to zero."""
    assert lost.chosen is not None
    disconnect(tensors_of(module), lost.groups, lost.chosen)
    return ExpertsRemoved(name, tuple(lost.chosen), scores=tuple(scores.get(name, ())))


def _judged_batches(
    store: BlockStore, job: BlockPruning, batches: list[Batch], sources: SampleSources
) -> list[Batch]:
    """The batches on which experts are judged, with separate states."""
    first = OpenBlock(
        job.adapter, nn.Identity(), 0, batches, store.ranks, mixed=sources.mixed
    )  # only to count them
    count = batches_to_judge(first, job.recipe.experts.tokens)
    return [
        Batch(b.state, b.calls, b.tokens, None, b.store, b.sample, b.sources, b.inputs)
        for b in batches[:count]
    ]


def _entered_batches(
    store: BlockStore, job: BlockPruning, tokens: Tensor | Samples, sources: SampleSources
) -> tuple[list[Batch], int]:
    """This rank's batches before the first block, and the number of batches for tuning.

    The batches for tuning are smaller, and come first.
    """
    tuning, batches, rest, tuning_count = job.recipe.tuning, list[Batch](), tokens, 0
    if tuning is not None:
        chosen = tuning.chosen(*tokens.shape)
        size = tuning.step_tokens(int(chosen.sum()), tokens.shape[1])
        batches = _batches(store, job, tokens[chosen], sources.part(chosen), size)
        tuning_count, rest, sources = len(batches), tokens[~chosen], sources.part(~chosen)
    if len(rest):
        batches += _batches(store, job, rest, sources, TOKENS_PER_BATCH)
    ranks = store.ranks
    if ranks.sum(not batches):
        message = f"too few samples: some of {ranks.size} ranks have none"
        raise AptError(message, "give more samples, or start fewer ranks", ("samples",))
    ranks.work.tokens = sum(batch.tokens for batch in batches)
    return batches, tuning_count


def _batches(
    store: BlockStore,
    job: BlockPruning,
    tokens: Tensor | Samples,
    sources: SampleSources,
    size: int,
) -> list[Batch]:
    """This rank's batches, of about ``size`` tokens, from samples."""
    size = min(size, math.ceil(len(tokens) / store.ranks.size) * tokens.shape[1])
    given = (job.adapter, store.model, tokens, size)
    aware, ranks = job.recipe.error_aware, store.ranks
    batches = enter(
        *given, with_dense=aware, ranks=ranks, store=store.activations, sources=sources.of
    )
    if aware and store.dense_outer:
        with _exchanged(store.model, store.dense_outer):
            dense_batches = enter(*given, ranks=ranks)
        for batch, dense in zip(batches, dense_batches, strict=True):
            assert batch.dense is not None
            batch.dense.state = dense.state
    return batches


@contextmanager
def _exchanged(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the context, the model has other values of some parameters."""
    before = {name: model.get_parameter(name).data for name in weights}
    try:
        for name, weight in weights.items():
            model.get_parameter(name).data = weight
        yield
    finally:
        for name, weight in before.items():
            model.get_parameter(name).data = weight


def _prune_opened(current: CurrentBlock, *, last: bool) -> list[BlockRecord]:
    """Prune or restore a block in memory, and run it unless it is the last block."""
    try:
        done = _prune_or_restore(current)
        if not last:
            check_finite(current.adapter, _propagated_states(current), current.ranks)
    except AptError as error:
        name = current.planned.name
        raise AptError(f"in {name}: {error.message}", error.hint, error.options) from error
    return done


def _prune_or_restore(current: CurrentBlock) -> list[BlockRecord]:
    """Prune a block, or restore it if an earlier run has pruned it."""
    name, store = current.planned.name, current.store
    if (records := store.kept(name)) is None:
        records = current.prune()
        store.keep(name, current.module, records)
        return records
    current.advance_judged(current.judged_after())
    for batch in current.batches:
        if batch.dense is not None:
            batch.dense.state = current.step_dense(batch)
            current.progress()
    pass_dropped(store, current.job, current.batches, current.dropped)
    store.read_kept(name, current.module)
    current.unrouted = unrouted_experts(current.module, current.planned.disconnected)
    for record in records:
        store.observe(record)
    return records


def _propagated_states(current: CurrentBlock) -> Iterator[State]:
    """The output of the pruned block for each batch, which becomes its state."""
    for batch in current.batches:
        if not current.propagated:
            batch.state = current.step(batch, batch.state)
            current.progress()
        yield batch.state
