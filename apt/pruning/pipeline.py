"""The loop over blocks: capture, solve, write back, propagate."""

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Site, State
from apt.adapter.recording import eval_mode
from apt.calibration.batches import TOKENS_PER_BATCH, Batch, check_finite, check_shape, enter
from apt.calibration.capture import Capture
from apt.calibration.dense_activations import advance_dense
from apt.calibration.storage import MemoryStore, Store
from apt.calibration.targets import Sums
from apt.distributed.ranks import Ranks
from apt.errors import AptError
from apt.events import BlockStarted, BlockTuned, Observer, SitePruned, Working
from apt.planning.plan import Plan, PlannedBlock, PlannedSite
from apt.pruning.block_storage import BlockStorage, MemoryBlocks
from apt.pruning.current_block import CurrentBlock, Dropped
from apt.pruning.disconnecting import disconnect_groups
from apt.pruning.layer import (
    Recipe,
    SiteMethod,
    SiteSolver,
    SolvedSite,
    mean_square,
    measured,
    round_site,
)
from apt.pruning.paused_forward import CannotPause, can_pause
from apt.pruning.ssm_parameters import prune_extras
from apt.tuning.block_tuning import BlockTuning, tune_block


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
    block_storage: BlockStorage | None = None,
    store: Store | None = None,
    ranks: Ranks | None = None,
    observe: Observer = lambda event: None,
) -> list[SitePruned]:
    """Prune ``model`` in place, one block after the other.

    Each block is run with its dense weights on the outputs of the pruned blocks before it. Its
    sites are solved from the Gram matrices of their inputs and written back, and the block is run
    again. If the sites are solved in order, both runs are one: the forward pauses before each site
    while its weight is solved. With error-aware targets, the activations of the dense model are
    computed as well.

    Args:
        model: the model; it is set to eval mode during the run.
        plan: the pattern of each site, from `apt.planning.plan.make_plan`.
        tokens: calibration token ids (samples, seqlen).
        recipe: the options; the default is layer-wise.
        block_storage: the storage of the blocks; None if all are in memory.
        store: the store of the activations between runs of blocks; None keeps them in memory. If
            they leave the model's device, forwards cannot pause, and a block is run again for each
            stage of sites that is solved in order.
        ranks: the processes that prune together; None for a single one. Each of them calls this
            function with the same arguments and ends with the same model.

    Raises:
        AptError: the tokens have another shape, activations are not finite, a site's inputs were
            not captured, or a solve failed.
    """
    check_shape(tokens)
    recipe = recipe or Recipe()
    solver = SiteSolver(method, recipe.solver, recipe.targets)
    run = _Pruning(
        adapter, solver, recipe, block_storage or MemoryBlocks(), store or MemoryStore(),
        ranks or Ranks(), observe,
    )  # fmt: skip
    with eval_mode(model), adapter.running(model):
        return run.prune_all(model, plan, tokens)


_Turn = tuple[int, SolvedSite]  # a solved site and its turn, which also determines its rank


@dataclass
class _Pruning:
    adapter: Adapter
    solver: SiteSolver
    recipe: Recipe
    block_storage: BlockStorage
    store: Store
    ranks: Ranks
    observe: Observer
    tuning_batches: int = 0  # the number of batches for tuning, which are the first ones
    can_pause: bool = False  # True if forwards can pause within a block

    @property
    def error_aware(self) -> bool:
        """True if the activations of the dense model are computed as well."""
        return self.solver.targets is not None

    def prune_all(self, model: nn.Module, plan: Plan, tokens: Tensor) -> list[SitePruned]:
        modules = dict(self.adapter.blocks(model))
        batches = self.enter(model, tokens)
        width = self.adapter.residual(batches[0].state).shape[-1]
        config = getattr(model, "config", None)
        self.can_pause = self.store.with_model and can_pause(
            self.adapter, config, tokens.shape[1], width
        )
        done: list[SitePruned] = []
        kept = [index for index, planned in enumerate(plan.blocks) if not planned.dropped]
        blocks = [(i, name, module) for i, (name, module) in enumerate(modules.items())]
        self.pass_dropped(batches, blocks[: kept[0]])
        for index, following in pairwise([*kept, len(plan.blocks)]):
            planned, dropped = plan.blocks[index], blocks[index + 1 : following]
            self.observe(BlockStarted(planned.name, index, len(plan.blocks)))
            module = modules[planned.name]
            with self.block_storage.open(planned.name, module):
                done += self.prune_opened(
                    self.opened(planned, module, index, batches, dropped), last=index == kept[-1]
                )
        return done

    def opened(
        self,
        planned: PlannedBlock,
        module: nn.Module,
        index: int,
        batches: list[Batch],
        dropped: Sequence[Dropped],
    ) -> CurrentBlock:
        progress = partial(self.observe, Working(planned.name, "running"))
        block = (self.adapter, module, index, batches, self.ranks, progress)
        return CurrentBlock(*block, planned=planned, dropped=dropped)

    def prune_opened(self, current: CurrentBlock, *, last: bool) -> list[SitePruned]:
        """Prune or restore a block that is in memory, and run it unless it is the last one."""
        try:
            done = self.prune_or_restore(current)
            if not last:
                self.propagate(current)
        except AptError as error:
            name = current.planned.name
            raise AptError(f"in {name}: {error.message}", error.hint, error.options) from error
        return done

    def prune_or_restore(self, current: CurrentBlock) -> list[SitePruned]:
        """Prune a block, or restore it if an earlier run has pruned it."""
        name = current.planned.name
        if (known := self.block_storage.pruned(name)) is None:
            known = self.prune_block(current)
            self.block_storage.keep(name, current.module, known)
            return known
        for batch in current.batches:
            if batch.dense is not None:
                batch.dense.state = current.step(batch, batch.dense.state)
                current.progress()
        self.pass_dropped(current.batches, current.dropped)
        self.block_storage.restore(name, current.module)
        for site in known:
            self.observe(site)
        return known

    def pass_dropped(self, batches: list[Batch], dropped: Sequence[Dropped]) -> None:
        """Run dropped blocks on the dense stream; the pruned stream does not pass them."""
        for index, name, module in dropped if self.error_aware else ():
            with self.block_storage.open(name, module):
                for batch in batches:
                    assert batch.dense is not None
                    state, call = batch.dense.state, batch.calls[index]
                    batch.dense.state = self.adapter.step(module, state, call)
                    self.observe(Working(name, "running"))

    def bridge_gap(self, current: CurrentBlock) -> None:
        """Record what dropped blocks add; the last site that writes takes it over."""
        writers = [site for site in current.sites if site.residual and not site.routed]
        if not current.dropped or not self.error_aware:
            return
        before = [self.dense_stream(batch) for batch in current.batches]
        self.pass_dropped(current.batches, current.dropped)
        for batch, start in zip(current.batches, before, strict=True):
            if writers and batch.dense is not None:
                batch.dense.gap = self.dense_stream(batch) - start
                batch.dense.gap_input = max(writers, key=lambda site: site.order).input

    def dense_stream(self, batch: Batch) -> Tensor:
        """The residual stream (tokens, hidden) of the dense model in fp32."""
        assert batch.dense is not None
        stream = self.adapter.residual(batch.dense.state)
        return stream.float().reshape(-1, stream.shape[-1]).clone()

    def enter(self, model: nn.Module, tokens: Tensor) -> list[Batch]:
        """This rank's batches before the first block; smaller ones for tuning come first."""
        how, batches, rest = self.recipe.tuning, list[Batch](), tokens
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
        return enter(
            self.adapter,
            model,
            tokens,
            size,
            with_dense=self.error_aware,
            ranks=self.ranks,
            store=self.store,
        )

    def prune_block(self, current: CurrentBlock) -> list[SitePruned]:
        """Prune a block: its extras, then its sites; then tune it.

        The outputs that it is tuned towards are those of the dense model before the next block that
        is not dropped.
        """
        current.scales = self.advance_dense_stream(current)
        self.bridge_gap(current)
        for lost in current.planned.disconnected:
            disconnect_groups(current, lost)
        current.planned = self.with_tied_groups(current)
        done = self.ranks.share(self.extras(current))
        solved: list[_Turn] = []
        rounds: list[dict[int, PlannedSite]] = []
        with closing(self.captured(current)) as stages:
            for stage, sums in stages:
                mean = mean_square(sums[e.site.input].gram for e in stage if e.site.routed)
                last = {entry.site.input: entry for entry in stage}
                for turns in self.ranks.rounds(stage):
                    solved += self.solve_round(current, turns, sums, mean)
                    for entry in turns.values():
                        if entry is last[entry.site.input]:
                            del sums[entry.site.input]  # with its factors, which are large
                    rounds.append(turns)
                    if self.recipe.tuning is None:
                        done += self.finish(current.module, solved, rounds)
        for batch in current.batches:
            if batch.dense is not None:
                batch.dense.inputs.clear()
                batch.dense.gap = None
        if self.recipe.tuning is not None and current.planned.pruned:
            self.tune(current, self.recipe.tuning)
            done += self.finish(current.module, solved, rounds)
        return done

    def finish(
        self, block: nn.Module, solved: list[_Turn], rounds: list[dict[int, PlannedSite]]
    ) -> list[SitePruned]:
        """Round the solved sites if the recipe says so, and measure them. Both lists are emptied.

        Each rank rounds the sites that it solved, and the others receive their weights.
        """
        if (integers := self.recipe.integers) is not None:
            for _, each in solved:
                round_site(block, each, integers, self.solver.options.damping)
            for turns in rounds:
                for turn, entry in turns.items():
                    self.ranks.send(entry.site.weight(block).data, self.ranks.owner(turn))
        done = self.measure(block, solved)
        solved.clear()
        rounds.clear()
        return done

    def with_tied_groups(self, current: CurrentBlock) -> PlannedBlock:
        """The planned block, with a choice of the groups that several sites lose together."""
        planned = current.planned
        for tied in planned.tied:
            last = next(entry for entry in planned.sites if entry.site.name == tied[-1])
            sums = self.capture(current, [last.site])[last.site.input]
            pattern = self.ranks.share(self.solver.chosen_groups(current.module, last, sums))
            planned = planned.with_patterns(dict.fromkeys(tied, pattern))
        return planned

    def advance_dense_stream(self, current: CurrentBlock) -> dict[Site, Tensor]:
        """Run the block on the dense stream; returns the row scales of sites that use them."""
        if not self.error_aware:
            return {}
        how = self.recipe.row_importance
        wanted = [e.site for e in current.planned.pruned if how and how.serves(e.site, e.pattern)]
        first = current.first_batches(how.tokens / self.ranks.size) if how and wanted else []
        starts = [batch.dense.state for batch in first if batch.dense]
        advance_dense(current, current.sites)
        states = (batch.dense.state for batch in current.batches if batch.dense)
        check_finite(self.adapter, states, self.ranks)
        if how is None or not wanted:
            return {}
        return how.scales(current.using(first), starts, wanted)

    def solve_round(
        self,
        current: CurrentBlock,
        turns: dict[int, PlannedSite],
        sums: dict[str, Sums],
        mean: float,
    ) -> list[_Turn]:
        """Solve this rank's site of a round, and receive the weights of the other ranks' sites."""
        own = []
        for turn, entry in turns.items():
            if self.ranks.owner(turn) == self.ranks.rank:
                given, scale = sums[entry.site.input], current.scales.get(entry.site)
                solved = self.solver.solve(current.module, entry, given, mean=mean, scale=scale)
                self.ranks.work.solves += 1
                self.ranks.work.solve_seconds += solved.seconds
                own.append((turn, solved))
                self.observe(Working(current.planned.name, "solving"))
        for turn, entry in turns.items():
            self.ranks.send(entry.site.weight(current.module).data, self.ranks.owner(turn))
        return own

    def extras(self, current: CurrentBlock) -> list[SitePruned]:
        """Prune the planned extras of a block."""
        planned, done = current.planned.extras, list[SitePruned]()
        if not planned:
            return []
        for extra in prune_extras(current, planned, self.solver.options):
            self.observe(extra)
            done.append(extra)
        return done

    def captured(
        self, current: CurrentBlock
    ) -> Generator[tuple[list[PlannedSite], dict[str, Sums]]]:
        """The sites in stages, each solved from one run, with the sums of their inputs.

        The sums are those over all ranks. Nothing else refers to them, so that those that are
        deleted are freed. If the sites are solved in order, one paused forward per batch gives all
        stages. It requires that inputs are not split into parts and that forwards can pause.
        Otherwise the block is run again for each stage.
        """
        left = list(current.planned.pruned)
        whole = not any(site.routed or site.calls > 1 for site in current.sites)
        if self.recipe.ordered and self.can_pause and whole and left:
            with suppress(CannotPause), current.paused_forwards(self.solver.targets) as forwards:
                while (name := forwards.next_input()) is not None:
                    sums = forwards.capture(name)
                    sums[name].add_up(self.ranks)
                    stage = [entry for entry in left if entry.site.input == name]
                    left = [entry for entry in left if entry.site.input != name]
                    yield stage, sums
                current.propagated = (
                    self.recipe.tuning is None and not self.block_storage.repeatable
                )
                forwards.finish(update_states=current.propagated)
        for stage in self.stages(left):
            yield stage, self.capture(current, [entry.site for entry in stage])

    def tune(self, current: CurrentBlock, how: BlockTuning) -> None:
        """Tune the kept weights of the block."""
        sites = [entry.site for entry in current.planned.pruned]
        progress = partial(self.observe, Working(current.planned.name, "tuning"))
        block = current.using(current.batches[: self.tuning_batches], progress)
        tuned = tune_block(block, sites, how)
        if tuned is not None:
            self.observe(BlockTuned(current.planned.name, tuned.before, tuned.after))

    def capture(self, current: CurrentBlock, sites: list[Site]) -> dict[str, Sums]:
        """The sums of the inputs of ``sites`` over all ranks, from a separate run of the block."""
        earlier = {}
        if self.error_aware:
            last = max(site.order for site in sites)
            earlier = {site: weight for site, weight in current.dense.items() if site.order < last}
        dense = [entry.site for entry in current.planned.sites if entry.pattern is None]
        routed = [site for site in dense if site.routed]
        capture = Capture(current.module, sites, self.solver.targets, routed)
        capture.run(current, earlier)
        for each in capture.sums.values():
            each.add_up(self.ranks)
        return capture.sums

    def stages(self, sites: Sequence[PlannedSite]) -> Iterable[list[PlannedSite]]:
        """The stages of ``sites``: each stage is solved from one run of the block."""
        if not self.recipe.ordered:
            return [list(sites)] if sites else []
        by_order = sorted(sites, key=lambda entry: entry.site.order)
        return [list(stage) for _, stage in groupby(by_order, key=lambda entry: entry.site.order)]

    def measure(self, block: nn.Module, solved: Sequence[_Turn]) -> list[SitePruned]:
        """Measure each written site on the rank that solved it, and report the sites of all."""
        own = [(turn, measured(block, each)) for turn, each in solved]
        turns = [pair for part in self.ranks.gather(own) for pair in part]
        done = [site for _, site in sorted(turns, key=itemgetter(0))]
        for site in done:
            self.observe(site)
        return done

    def propagate(self, current: CurrentBlock) -> None:
        """Replace the state of every batch by the output of the pruned block, and check it."""
        check_finite(self.adapter, self.propagated(current), self.ranks)

    def propagated(self, current: CurrentBlock) -> Iterator[State]:
        """The output of the pruned block for each batch, which is its next state."""
        for batch in current.batches:
            if not current.propagated:
                batch.state = current.step(batch, batch.state)
                current.progress()
            yield batch.state
