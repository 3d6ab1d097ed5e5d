"""The loop over blocks: capture, solve, write back, propagate."""

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Site, State
from apt.adapter.eval_mode import eval_mode
from apt.calibration.batches import TOKENS_PER_BATCH, Batch, enter
from apt.calibration.capture import Capture
from apt.calibration.dense_activations import advance_dense
from apt.calibration.storage import MemoryStore, Store
from apt.calibration.sums import Sums
from apt.calibration.targets import Targets
from apt.distributed.ranks import Ranks
from apt.errors import AptError
from apt.events import BlockStarted, BlockTuned, Observer, SitePruned, Working
from apt.planning.plan import Plan, PlannedBlock, PlannedSite
from apt.pruning.block_storage import BlockStorage, MemoryBlocks
from apt.pruning.layer import Method, SiteSolver, SolvedSite, mean_square, measured
from apt.pruning.paused_forward import CannotWait, Walk, may_wait
from apt.pruning.recipe import Recipe
from apt.pruning.ssm_parameters import prune_extras
from apt.tuning.reconstruct import Reconstruction, reconstruct


@torch.no_grad()
def prune_blocks(
    model: nn.Module,
    adapter: Adapter,
    plan: Plan,
    tokens: Tensor,
    method: Method,
    recipe: Recipe | None = None,
    *,
    block_storage: BlockStorage | None = None,
    store: Store | None = None,
    ranks: Ranks | None = None,
    observe: Observer = lambda event: None,
) -> list[SitePruned]:
    """Prune ``model`` in place, one block after the other.

    Every block is run with its dense weights on what the pruned blocks before it give, its sites
    are solved from the Gram matrices of their inputs and written back, and it is run again. In
    order, both is one run, that waits while the weights are solved which it comes to.
    With error-aware targets, the activations of the dense model are carried along beside those of
    the pruned one.

    Args:
        model: the model, in eval mode while this runs.
        adapter: the adapter of its family.
        plan: what to do to each site, from `apt.planning.plan.make_plan`.
        tokens: calibration token ids (samples, seqlen).
        method: the pruning method.
        recipe: how it is applied; by default strictly layer-wise.
        block_storage: where blocks are while they have no turn; None where all are in memory.
        store: where the activations are while no block is run on them; None for in memory. On disk
            they do not wait inside a block either, which is run again for each of its sites that
            are solved in order.
        ranks: the processes that prune together, each of which calls this with the same arguments
            and is left with the same model; None for a single one.
        observe: called with each event as it happens.

    Raises:
        AptError: the tokens have another shape, activations are not finite, a site's inputs were
            not seen, or a solve failed.
    """
    if tokens.ndim != 2 or not tokens.numel():
        raise AptError(f"tokens have shape {tuple(tokens.shape)}", "give (samples, seqlen)")
    recipe = recipe or Recipe()
    solver = SiteSolver(method, recipe.solver, recipe.targets)
    run = _Pruning(
        adapter, solver, recipe, block_storage or MemoryBlocks(), store or MemoryStore(),
        ranks or Ranks(), observe,
    )  # fmt: skip
    with eval_mode(model), adapter.running(model):
        return run.all(model, plan, tokens)


_Turn = tuple[int, SolvedSite]  # a site by the turn that it is solved in, by whichever rank


@dataclass
class _Pruning:
    adapter: Adapter
    solver: SiteSolver
    recipe: Recipe
    block_storage: BlockStorage
    store: Store
    ranks: Ranks
    observe: Observer
    tuned: int = 0  # how many of the batches, from the first, are tuned on
    waits: bool = False  # whether batches may wait within a block

    @property
    def aware(self) -> bool:
        """Whether the dense stream goes along."""
        return self.solver.targets is not None

    def all(self, model: nn.Module, plan: Plan, tokens: Tensor) -> list[SitePruned]:
        modules = dict(self.adapter.blocks(model))
        batches = self.enter(model, tokens)
        width = self.adapter.residual(batches[0].state).shape[-1]
        config = getattr(model, "config", None)
        self.waits = self.store.with_model and may_wait(
            self.adapter, config, tokens.shape[1], width
        )
        done: list[SitePruned] = []
        for index, planned in enumerate(plan.blocks):
            self.observe(BlockStarted(planned.name, index, len(plan.blocks)))
            module = modules[planned.name]
            with self.block_storage.open(planned.name, module):
                at = _Block(self.adapter, module, planned, index, batches)
                try:
                    done += self.turn(at)
                    if index + 1 < len(plan.blocks):
                        self.leave(at)
                except AptError as error:
                    raise AptError(
                        f"in {planned.name}: {error.message}", error.hint, error.options
                    ) from error
        return done

    def turn(self, at: "_Block") -> list[SitePruned]:
        """Prune a block, or take it as an earlier run has left it."""
        name = at.planned.name
        if (known := self.block_storage.pruned(name)) is None:
            known = self.block(at)
            self.block_storage.keep(name, at.module, known)
            return known
        for batch in at.batches:
            if batch.dense is not None:
                call = batch.calls[at.index]
                batch.dense.state = self.adapter.step(at.module, batch.dense.state, call)
                self.tell(at)
        self.block_storage.restore(name, at.module)
        for site in known:
            self.observe(site)
        return known

    def enter(self, model: nn.Module, tokens: Tensor) -> list[Batch]:
        """This rank's batches before the first block; those to tune on are small, and come first.

        Raises:
            AptError: a rank is left without any.
        """
        how, batches, rest = self.recipe.reconstruction, list[Batch](), tokens
        if how is not None:
            chosen = how.chosen(*tokens.shape)
            batches = self.batches(model, tokens[chosen], how.tokens_per_batch)
            self.tuned, rest = len(batches), tokens[~chosen]
        if len(rest):
            batches += self.batches(model, rest, TOKENS_PER_BATCH)
        if self.ranks.sum(not batches):
            raise AptError(
                f"too few samples: some of {self.ranks.size} ranks are left without any",
                "give more samples, or start fewer ranks",
                ("samples",),
            )
        self.ranks.work.tokens = sum(batch.tokens for batch in batches)
        return batches

    def batches(self, model: nn.Module, tokens: Tensor, size: int) -> list[Batch]:
        """This rank's batches of about ``size`` of ``tokens`` (samples, seqlen)."""
        size = min(size, math.ceil(len(tokens) / self.ranks.size) * tokens.shape[1])
        return enter(
            self.adapter,
            model,
            tokens,
            size,
            with_dense=self.aware,
            ranks=self.ranks,
            store=self.store,
        )

    def block(self, at: "_Block") -> list[SitePruned]:
        """Prune a block."""
        at.scales = self.advance(at)
        done = self.ranks.share(self.extras(at))
        solved: list[_Turn] = []
        with closing(self.captured(at)) as groups:
            for group, sums in groups:
                for each in sums.values():
                    each.add_up(self.ranks)
                mean = mean_square(sums[e.site.input].gram for e in group if e.site.routed)
                for turns in self.ranks.rounds(group):
                    solved += self.solve_round(at, turns, sums, mean)
                    if self.recipe.reconstruction is None:
                        done += self.finish(at.module, solved)
                        solved.clear()
        for batch in at.batches:
            if batch.dense is not None:
                batch.dense.inputs.clear()
        if self.recipe.reconstruction is not None and at.planned.pruned:
            self.tune(at, self.recipe.reconstruction)
            done += self.finish(at.module, solved)
        return done

    def advance(self, at: "_Block") -> dict[Site, Tensor]:
        """Take the dense stream through the block, and weigh the rows of what gains by it."""
        if not self.aware:
            return {}
        how = self.recipe.row_importance
        wanted = [e.site for e in at.planned.pruned if how and how.serves(e.site, e.pattern)]
        first = at.first(how.tokens / self.ranks.size) if how and wanted else []
        starts = [batch.dense.state for batch in first if batch.dense]
        block = (self.adapter, at.module, at.index)
        advance_dense(*block, at.batches, at.sites, self.ranks, partial(self.tell, at))
        for batch in at.batches:
            assert batch.dense is not None
            _check_finite(batch.dense.state)
        if how is None or not wanted:
            return {}
        return how.scales(*block, first, starts, wanted, self.ranks, partial(self.tell, at))

    def solve_round(
        self, at: "_Block", turns: dict[int, PlannedSite], sums: dict[str, Sums], mean: float
    ) -> list[_Turn]:
        """Solve this rank's of some sites, by turn, and take over what the others solve."""
        own = []
        for turn, entry in turns.items():
            if self.ranks.owner(turn) == self.ranks.rank:
                given, scale = sums[entry.site.input], at.scales.get(entry.site)
                solved = self.solver.solve(at.module, entry, given, mean=mean, scale=scale)
                self.ranks.work.solves += 1
                self.ranks.work.solve_seconds += solved.seconds
                own.append((turn, solved))
                self.observe(Working(at.planned.name, "solving"))
        for turn, entry in turns.items():
            self.ranks.send(entry.site.weight(at.module).data, self.ranks.owner(turn))
        return own

    def extras(self, at: "_Block") -> list[SitePruned]:
        """Prune what is asked for beside the sites."""
        planned, done = at.planned.extras, []
        if not planned:
            return []
        args = (self.adapter, at.module, at.index, at.batches, planned, self.solver.options)
        for extra in prune_extras(*args, self.ranks):
            pruned = SitePruned(
                extra.planned.name,
                extra.planned.extra.name,
                extra.planned.shape,
                str(extra.planned.pattern),
                extra.zeros,
                extra.relative_error,
                extra.damping,
                None,
                extra.tokens,
                extra.seconds,
            )
            self.observe(pruned)
            done.append(pruned)
        return done

    def captured(self, at: "_Block") -> Generator[tuple[list[PlannedSite], dict[str, Sums]]]:
        """The sites to solve in turn, with the sums of their inputs.

        In order, a single walk through the block gives all, where inputs come whole and it may
        wait.
        """
        left = list(at.planned.pruned)
        whole = not any(site.routed or site.calls > 1 for site in at.sites)
        if self.recipe.ordered and self.waits and whole and left:
            tell = partial(self.tell, at)
            with suppress(CannotWait), at.walk(self.solver.targets, tell) as walk:
                while (name := walk.next_input()) is not None:
                    sums = walk.capture(name)
                    group = [entry for entry in left if entry.site.input == name]
                    left = [entry for entry in left if entry.site.input != name]
                    yield group, {name: sums}
                at.left = self.recipe.reconstruction is None and not self.block_storage.repeatable
                walk.finish(leave=at.left)
        for group in self.groups(left):
            yield group, self.capture(at, [entry.site for entry in group])

    def tune(self, at: "_Block", how: Reconstruction) -> None:
        """Tune the block's kept weights."""
        sites = [entry.site for entry in at.planned.pruned]
        batches = at.batches[: self.tuned]
        block = (self.adapter, at.module, at.index)
        tell = partial(self.observe, Working(at.planned.name, "tuning"))
        tuned = reconstruct(*block, batches, sites, how, self.ranks, tell)
        if tuned is not None:
            self.observe(BlockTuned(at.planned.name, tuned.before, tuned.after))

    def capture(self, at: "_Block", sites: list[Site]) -> dict[str, Sums]:
        """The sums of the inputs of ``sites``, by the inputs' names, from a run of its own."""
        earlier = {}
        if self.aware:
            last = max(site.order for site in sites)
            earlier = {site: weight for site, weight in at.dense.items() if site.order < last}
        dense = [entry.site for entry in at.planned.sites if entry.pattern is None]
        routed = [site for site in dense if site.routed]
        capture = Capture(at.module, sites, self.solver.targets, routed)
        block = (self.adapter, at.module, at.index)
        capture.run(*block, at.batches, earlier, partial(self.tell, at))
        return capture.sums

    def groups(self, sites: Sequence[PlannedSite]) -> Iterable[list[PlannedSite]]:
        """The sites that are solved from one run of the block."""
        if not self.recipe.ordered:
            return [list(sites)] if sites else []
        by_order = sorted(sites, key=lambda entry: entry.site.order)
        return [list(group) for _, group in groupby(by_order, key=lambda entry: entry.site.order)]

    def finish(self, block: nn.Module, solved: Sequence[_Turn]) -> list[SitePruned]:
        """Measure sites as they are written, each where it was solved, and tell of all."""
        own = [(turn, measured(block, each)) for turn, each in solved]
        turns = [pair for part in self.ranks.gather(own) for pair in part]
        done = [site for _, site in sorted(turns, key=itemgetter(0))]
        for site in done:
            self.observe(site)
        return done

    def tell(self, at: "_Block") -> None:
        """Tell that one more batch was run through a block."""
        self.observe(Working(at.planned.name, "running"))

    def leave(self, at: "_Block") -> None:
        """Replace every batch's state by what the pruned block makes of it."""
        for batch in at.batches:
            if not at.left:
                batch.state = self.adapter.step(at.module, batch.state, batch.calls[at.index])
                self.tell(at)
            _check_finite(batch.state)


@dataclass
class _Block:
    """A block whose turn has come.

    Attributes:
        sites: all its sites.
        dense: the dense weights (out, in) of those that write to the residual stream.
        scales: by how much more each row (out, 1) of a site matters than others, where that is
            weighed.
        left: whether the batches are behind it already.
    """

    adapter: Adapter
    module: nn.Module
    planned: PlannedBlock
    index: int
    batches: list[Batch]
    scales: dict[Site, Tensor] = field(default_factory=dict)
    left: bool = False

    def __post_init__(self) -> None:
        self.sites = self.adapter.sites(self.module)
        writers = (site for site in self.sites if site.residual)
        self.dense = {s: s.oriented(s.weight(self.module).data).clone() for s in writers}

    def first(self, tokens: float) -> list[Batch]:
        """As many batches, from the first, as have about so many tokens; one at least."""
        count = 1 + int((tokens - 1) // self.batches[0].tokens)
        return self.batches[:count]

    def walk(self, targets: Targets | None, tell: Callable[[], None]) -> Walk:
        """A walk of all batches through it."""
        ahead = [entry.site for entry in self.planned.pruned]
        block = (self.adapter, self.module, self.index)
        return Walk(*block, self.batches, self.sites, ahead, self.dense, targets, tell)


def _check_finite(state: State) -> None:
    """Raise where a block has made of its input what is not a number."""
    if isinstance(state, Tensor) and not torch.isfinite(state).all():
        raise AptError(
            "the activations after it are not finite",
            "try dtype float32, or bfloat16 instead of float16",
            ("dtype",),
        )
