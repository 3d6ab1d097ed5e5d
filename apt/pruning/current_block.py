"""The block that is being pruned: its sites are solved in stages, tuned, rounded and measured."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from operator import itemgetter

from torch import Tensor, nn

from apt.adapter import Routing, Site, State, routings
from apt.adapter.groups import gather, tensors_of
from apt.calibration.batches import Batch, OpenBlock, autocast_of, check_finite, dense_call
from apt.calibration.capture import Capture
from apt.calibration.dense_activations import advance_dense, stream_rows
from apt.calibration.passing import BlockPass
from apt.calibration.sources import RoutedBySource
from apt.calibration.stored_products import StoredProducts
from apt.calibration.targets import Sums
from apt.errors import AptError
from apt.events import BlockRecord, BlockTuned, ExpertsRemoved, ExpertsRouted, SitePruned, Working
from apt.planning.plan import PlannedBlock, PlannedSite
from apt.pruning.block_store import BlockStore
from apt.pruning.disconnecting import disconnect_groups
from apt.pruning.layer import (
    BlockPruning,
    SolvedSite,
    chosen_groups,
    mean_square,
    measured,
    round_site,
    solve_site,
)
from apt.pruning.permuting import permute_inputs, permuted_experts
from apt.pruning.ssm_parameters import prune_extras
from apt.tuning.block_tuning import BlockTuning, tune_block

Dropped = tuple[int, str, nn.Module]
"""The index, the name and the module of a dropped block."""


def pass_dropped(
    store: BlockStore, job: BlockPruning, batches: list[Batch], dropped: Sequence[Dropped]
) -> None:
    """Run dropped blocks on the dense stream; the pruned stream does not pass them."""
    for index, name, module in dropped if job.recipe.error_aware else ():
        with store.open(name, module):
            for batch in batches:
                assert batch.dense is not None
                call = dense_call(batch, index)
                batch.dense.state = job.adapter.step(module, batch.dense.state, call)
                store.observe(Working(name, "running"))


_Turn = tuple[int, SolvedSite]  # a solved site and its turn, which also determines its rank


@dataclass(kw_only=True)
class CurrentBlock(OpenBlock):
    """The block that is being pruned, with all inputs of its solves.

    Attributes:
        dropped: the dropped blocks between this block and the next kept block.
        tuning_batches: the number of the first batches, which are for tuning.
        dense: the dense weights (out, in) of the sites that write to the residual stream; empty
            without a dense stream, since only the drift between the streams needs them.
        scales: the factors of the rows (out, 1) of each site with row importance.
        orders: the former index of each column, by the full name of a site with permuted inputs.
        propagated: True if the states of the batches are already the states after the block.
        judged: the batches with the states before the block in the dense model, if experts are
            judged on these states; after the block they have the states after it.
        usage: the record of the experts' tokens by source; None if it is not known yet.
    """

    store: BlockStore
    job: BlockPruning
    planned: PlannedBlock
    dropped: Sequence[Dropped]
    tuning_batches: int
    scales: dict[Site, Tensor] = field(default_factory=dict)
    orders: dict[str, Tensor] = field(default_factory=dict)
    propagated: bool = False
    judged: Sequence[Batch] = ()
    usage: ExpertsRouted | None = None

    def __post_init__(self) -> None:
        self.autocast = autocast_of(self, self.job.recipe.compute)
        self.sites = self.adapter.sites(self.module)
        writers = (site for site in self.sites if site.residual and self.job.recipe.error_aware)
        self.dense = {s: s.oriented(s.weight(self.module).data).clone() for s in writers}

    def prune(self) -> list[BlockRecord]:
        """Prune the block: groups without readers, its extras, then its sites; then tune it.

        The target of the tuning is the dense stream before the next kept block.
        """
        after = self.judged_after()
        self.scales = self._advance_dense_stream()
        self._bridge_gap()
        done = list[BlockRecord](self._disconnected())
        self.advance_judged(after)
        self.planned = self._with_tied_groups()
        done += self.ranks.share(self._extras())
        solved: list[_Turn] = []
        rounds: list[dict[int, PlannedSite]] = []
        with closing(self._captured()) as stages:
            for stage, sums in stages:
                mean = mean_square(sums[e.site.input].gram for e in stage if e.site.routed)
                last = {entry.site.input: entry for entry in stage}
                for turns in self.ranks.rounds(stage):
                    solved += self._solve_round(turns, sums, mean)
                    for entry in turns.values():
                        if entry is last[entry.site.input]:
                            del sums[entry.site.input]  # with its factors, which are large
                    rounds.append(turns)
                    if self.job.recipe.tuning is None:
                        done += self._finish(solved, rounds)
        for batch in self.batches:
            if batch.dense is not None:
                batch.dense.inputs.clear()
                batch.dense.gap = None
        if self.job.recipe.tuning is not None and self.planned.pruned:
            self._tune(self.job.recipe.tuning)
            done += self._finish(solved, rounds)
        self._gather()
        if self.usage is not None:
            self.store.observe(self.usage)
            done.append(self.usage)
        return done

    def judged_after(self) -> list[State]:
        """The states of the batches on which experts are judged, after the dense block."""
        return [self.step(batch, batch.state) for batch in self.judged]

    def advance_judged(self, after: Sequence[State]) -> None:
        """Let these batches have the states after the block."""
        for batch, state in zip(self.judged, after, strict=True):
            batch.state = state

    def _disconnected(self) -> Iterator[ExpertsRemoved]:
        """Disconnect the groups without readers; yields the records of removed experts."""
        recipe = self.job.recipe
        for lost in self.planned.disconnected:
            damping = recipe.solver.damping
            judged = self.using(list(self.judged)) if self.judged else None
            result = disconnect_groups(self, lost, recipe.experts, damping, judged)
            if lost.groups.routed:
                removed = ExpertsRemoved(
                    self.planned.name, result.chosen, result.merged, result.scores,
                    result.underserved, result.unprotected,
                )  # fmt: skip
                if result.by_source is not None:
                    self.usage = result.by_source.record(self.planned.name)
                self.store.observe(removed)
                yield removed

    def _gather(self) -> None:
        """Move the removed channels of each reader behind its kept channels; see `gather`."""
        for groups in (entry.groups for entry in self.planned.groups if entry.groups.apart):
            readers = [site for site in self.sites if site.name in groups.readers]
            gather(tensors_of(self.module), groups, readers)

    def _advance_dense_stream(self) -> dict[Site, Tensor]:
        """Run the block on the dense stream; returns the scales of rows by their importance."""
        if not self.job.recipe.error_aware:
            return {}
        how = self.job.recipe.row_importance
        wanted = [e.site for e in self.planned.pruned if how and how.serves(e.site, e.pattern)]
        first = self.first_batches(how.tokens / self.ranks.size) if how and wanted else []
        starts = [batch.dense.state for batch in first if batch.dense]
        squares = advance_dense(self, self.sites, permuted_experts(self.planned))
        states = (batch.dense.state for batch in self.batches if batch.dense)
        check_finite(self.adapter, states, self.ranks)
        self.orders = permute_inputs(self, self.planned, self.dense, squares)
        if how is None or not wanted:
            return {}
        return how.scales(self.using(first), starts, wanted)

    def _bridge_gap(self) -> None:
        """Record the sum that dropped blocks add, to which the last writing site is fitted."""
        writers = [site for site in self.sites if site.residual and not site.routed]
        if not self.dropped or not self.job.recipe.error_aware:
            return
        dense = [batch.dense for batch in self.batches if batch.dense is not None]
        before = [stream_rows(self.adapter, each.state).clone() for each in dense]
        pass_dropped(self.store, self.job, self.batches, self.dropped)
        for each, start in zip(dense, before, strict=True):
            if writers:
                each.gap = stream_rows(self.adapter, each.state) - start
                each.gap_input = max(writers, key=lambda site: site.order).input

    def _with_tied_groups(self) -> PlannedBlock:
        """The planned block, with chosen groups for sites that lose the same groups."""
        planned = self.planned
        for tied in planned.tied:
            last = next(entry for entry in planned.sites if entry.site.name == tied[-1])
            sums = self._capture([last.site])[last.site.input]
            pattern = self.ranks.share(chosen_groups(self.job, self.module, last, sums))
            planned = planned.with_patterns(dict.fromkeys(tied, pattern))
        return planned

    def _extras(self) -> list[SitePruned]:
        """Prune the planned extras of the block."""
        planned, done = self.planned.extras, list[SitePruned]()
        for extra in prune_extras(self, planned, self.job.recipe.solver) if planned else ():
            self.store.observe(extra)
            done.append(extra)
        return done

    def _captured(self) -> Generator[tuple[list[PlannedSite], dict[str, Sums]]]:
        """The stages of sites, with the sums of their inputs over all ranks, from one run each.

        Nothing else refers to the sums, so that deleted sums are freed.
        """
        passes, stages = self._passes(), self._stages(self.planned.pruned)
        self.propagated = bool(
            passes and stages and self.job.recipe.tuning is None and not self.store.repeatable
        )
        for stage in stages:
            sums = self._capture([entry.site for entry in stage], passes)
            if stage is stages[-1] and not self.propagated:
                passes.clear()  # before the solves, which need memory
            yield stage, sums
        for batch in self.batches if self.propagated else ():
            with passes.pop(0).run():
                batch.state = self.step(batch, batch.state)
            self.progress()

    def _passes(self) -> list[BlockPass]:
        """The passes of the batches through all stages; empty if each stage has separate passes."""
        if not (self.job.recipe.ordered and self.store.activations.with_model):
            return []
        weights = {site: site.weight(self.module).data for site in self.sites}
        return [BlockPass(batch, StoredProducts(weights)) for batch in self.batches]

    def _stages(self, sites: Sequence[PlannedSite]) -> list[list[PlannedSite]]:
        """The stages of ``sites``: each stage is solved from one run of the block."""
        if not self.job.recipe.ordered:
            return [list(sites)] if sites else []
        by_order = sorted(sites, key=lambda entry: entry.site.order)
        return [list(stage) for _, stage in groupby(by_order, key=lambda entry: entry.site.order)]

    def _capture(self, sites: list[Site], passes: Sequence[BlockPass] = ()) -> dict[str, Sums]:
        """The sums of the inputs of ``sites`` over all ranks, from a run of the block."""
        last = max(site.order for site in sites)
        earlier = {site: weight for site, weight in self.dense.items() if site.order < last}
        dense = [entry.site for entry in self.planned.sites if entry.pattern is None]
        routed = [site for site in dense if site.routed]
        capture = Capture(self.module, sites, self.job.recipe.targets, routed)
        pruned = [entry.site for entry in self.planned.pruned]
        with self._routing(sites):
            capture.run(self, earlier, passes, [site for site in pruned if site.order >= last])
        later = [site for site in self.sites if site.order >= last]
        left = {site.input for site in later} | {site.added_to for site in later}
        for batch in self.batches if passes else ():
            if batch.dense is not None:
                batch.dense.inputs.keep(left)
        for each in capture.sums.values():
            each.add_up(self.ranks)
        return capture.sums

    @contextmanager
    def _routing(self, sites: Sequence[Site]) -> Iterator[None]:
        """While entered, the first run of the experts records their tokens by source.

        Experts that do not get the indices of each token's experts have no record.
        """
        stacked = [site for site in sites if site.expert is not None]
        if not stacked or self.usage is not None:
            yield
            return
        path, recorded = stacked[0].parameter.rpartition(".")[0], list[Routing]()
        count = max(site.expert or 0 for site in self.sites) + 1
        with ExitStack() as stack:
            with suppress(AptError):
                stack.enter_context(routings(self.module.get_submodule(path), recorded.append))
            yield
        by_source = RoutedBySource(self.sources, count)
        tokens = [batch.tokens for batch in self.batches]
        complete = [len(routing.index) for routing in recorded] == tokens
        for batch, routing in zip(self.batches, recorded, strict=False) if complete else ():
            by_source.add(routing, batch.token_sources())
        by_source.over_ranks(self.ranks)
        if complete:
            self.usage = by_source.record(self.planned.name)

    def _solve_round(
        self, turns: dict[int, PlannedSite], sums: dict[str, Sums], mean: float
    ) -> list[_Turn]:
        """Solve the site of this rank in a round, and receive the weights of the other sites."""
        own = []
        for turn, entry in turns.items():
            if self.ranks.owner(turn) == self.ranks.rank:
                given, scale = sums[entry.site.input], self.scales.get(entry.site)
                solved = solve_site(self.job, self.module, entry, given, mean=mean, scale=scale)
                self.ranks.work.solves += 1
                self.ranks.work.solve_seconds += solved.seconds
                own.append((turn, solved))
                self.store.observe(Working(self.planned.name, "solving"))
        self._exchange(turns)
        return own

    def _exchange(self, turns: dict[int, PlannedSite]) -> None:
        """Send the weights of a round that this rank has solved, and receive the other weights."""
        for turn, entry in turns.items():
            self.ranks.send(entry.site.weight(self.module).data, self.ranks.owner(turn))

    def _tune(self, how: BlockTuning) -> None:
        """Tune the kept weights of the block."""
        sites = [entry.site for entry in self.planned.pruned]
        progress = partial(self.store.observe, Working(self.planned.name, "tuning"))
        block = self.using(self.batches[: self.tuning_batches], progress)
        tuned = tune_block(block, sites, how)
        if tuned is not None:
            self.store.observe(BlockTuned(self.planned.name, tuned.before, tuned.after))

    def _finish(
        self, solved: list[_Turn], rounds: list[dict[int, PlannedSite]]
    ) -> list[SitePruned]:
        """Round the solved sites that have a grid, and measure all. Both lists are emptied.

        Each rank rounds and measures the sites that it solved. The other ranks receive the weights
        and the records of these sites.
        """
        if any(entry.grid for entry in self.planned.pruned):
            for _, each in solved:
                parameter = f"{self.planned.name}.{each.planned.site.parameter}"
                stored = self.store.dtypes.get(parameter)
                result = round_site(self.module, each, self.job.recipe.solver.damping, stored)
                if result is not None:
                    self.store.keep_rounded(parameter, each.planned.site, result)
            for turns in rounds:
                self._exchange(turns)
        own = [(turn, self._record(each)) for turn, each in solved]
        gathered = [pair for part in self.ranks.gather(own) for pair in part]
        done = [site for _, site in sorted(gathered, key=itemgetter(0))]
        for site in done:
            self.store.observe(site)
        solved.clear()
        rounds.clear()
        return done

    def _record(self, solved: SolvedSite) -> SitePruned:
        """The record of a site, with the order of its inputs."""
        order = self.orders.get(solved.planned.name)
        found = measured(self.module, solved)
        return found if order is None else replace(found, order=tuple(order.tolist()))
