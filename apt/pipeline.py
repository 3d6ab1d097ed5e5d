"""The loop over blocks: capture, solve, write back, propagate."""

import math
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Protocol

import torch
from torch import Tensor, nn

from apt.activations import MemoryStore, Store
from apt.adapter import Adapter, Site, State
from apt.batches import TOKENS_PER_BATCH, Batch, enter
from apt.capture import Capture, Sums, advance_reference
from apt.errors import AptError
from apt.eval_mode import eval_mode
from apt.extras import prune_extras
from apt.importance import Importance
from apt.plan import Plan, PlannedBlock, PlannedSite
from apt.ranks import Ranks
from apt.reconstruct import Reconstruction, reconstruct
from apt.residency import InMemory, Residency
from apt.solver import Gram, Pattern, Solution, SolverError, SolverOptions, relative_layer_error
from apt.solver.patterns import meets
from apt.targets import Targets
from apt.walk import InParts, Walk


class Method(Protocol):
    """A pruning method: a weight (out, in) in fp32, its Gram matrix and a pattern to a solution."""

    def __call__(
        self, weight: Tensor, gram: Gram, pattern: Pattern, options: SolverOptions, /
    ) -> Solution:
        """Prune one layer."""


@dataclass(frozen=True)
class BlockStarted:
    """A block's turn has come; ``index`` counts from 0."""

    name: str
    index: int
    blocks: int


@dataclass(frozen=True)
class SitePruned:
    """What was done to one site.

    Attributes:
        name: its full name.
        kind: its name within the block, which experts have in common.
        shape: (out, in).
        pattern: the pattern asked for.
        zeros: the zeros now in the weight.
        relative_error: the relative layer error of the weight as written, in its own dtype.
        damping: the damping used; None where the method uses none.
        residual: what a joint solve left of its normal equations, see `apt.solver.Joint`.
        tokens: the calibration tokens that it saw.
        seconds: the time of the solve.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    pattern: str
    zeros: int
    relative_error: float
    damping: float | None
    residual: float | None
    tokens: int
    seconds: float

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def starved(self) -> bool:
        """Whether it saw fewer tokens than it has inputs, as an expert may."""
        return self.tokens < self.shape[1]


@dataclass(frozen=True)
class BlockTuned:
    """A block's kept weights have been tuned.

    Attributes:
        name: the block.
        before, after: the error of its output on the samples held back, see
            `apt.reconstruct.Tuned`.
    """

    name: str
    before: float
    after: float


Event = BlockStarted | SitePruned | BlockTuned
Observer = Callable[[Event], None]


def telling(observe: Observer, tell: Callable[[SitePruned], None]) -> Observer:
    """``observe``, with ``tell`` called as well for every site that is pruned."""

    def both(event: Event) -> None:
        observe(event)
        if isinstance(event, SitePruned):
            tell(event)

    return both


@torch.no_grad()
def prune_blocks(
    model: nn.Module,
    adapter: Adapter,
    plan: Plan,
    tokens: Tensor,
    method: Method,
    options: SolverOptions | None = None,
    *,
    targets: Targets | None = None,
    importance: Importance | None = None,
    reconstruction: Reconstruction | None = None,
    ordered: bool = False,
    resident: Residency | None = None,
    store: Store | None = None,
    ranks: Ranks | None = None,
    observe: Observer = lambda event: None,
) -> list[SitePruned]:
    """Prune ``model`` in place, one block after the other.

    Every block is run with its dense weights on what the pruned blocks before it give, its sites
    are solved from the Gram matrices of their inputs and written back, and it is run again. In
    order, both is one run, that waits while the weights are solved which it comes to.
    With ``targets``, the untouched model's activations are carried along beside the pruned one's.

    Args:
        model: the model, in eval mode while this runs.
        adapter: the adapter of its family.
        plan: what to do to each site, from `apt.plan.make_plan`.
        tokens: calibration token ids (samples, seqlen).
        method: the pruning method.
        options: the solver's options; see `apt.mode.choose_mode` for what suits a mode.
        targets: how much of the error so far each site makes up for; None prunes strictly layer by
            layer.
        importance: how rows are weighted in the choice of masks, if at all; heeded with
            ``targets``.
        reconstruction: how the kept weights of a block are tuned once its sites are solved, if at
            all; needs ``targets``.
        ordered: within a block, solve the sites in their order of execution, each on what the
            pruned ones before it give.
        resident: where blocks are while they have no turn; None where all are in memory.
        store: where the activations are while no block is run on them; None for in memory. On disk
            they do not wait inside a block either, which is run again for each of its sites that
            ``ordered`` solves by themselves.
        ranks: the processes that prune together, each of which calls this with the same arguments
            and is left with the same model; None for a single one.
        observe: called with each event as it happens.

    Raises:
        AptError: the tokens have another shape, activations are not finite, a site's inputs were
            not seen, or a solve failed.
    """
    if tokens.ndim != 2 or not tokens.numel():
        raise AptError(f"tokens have shape {tuple(tokens.shape)}", "give (samples, seqlen)")
    run = _Run(
        adapter, method, options or SolverOptions(), targets, importance, reconstruction,
        ordered, resident or InMemory(), store or MemoryStore(), ranks or Ranks(), observe,
    )  # fmt: skip
    with eval_mode(model), adapter.running(model):
        return run.all(model, plan, tokens)


@dataclass
class _Run:
    adapter: Adapter
    method: Method
    options: SolverOptions
    targets: Targets | None
    importance: Importance | None
    reconstruction: Reconstruction | None
    ordered: bool
    resident: Residency
    store: Store
    ranks: Ranks
    observe: Observer
    tuned: int = 0  # how many of the batches, from the first, are tuned on

    def all(self, model: nn.Module, plan: Plan, tokens: Tensor) -> list[SitePruned]:
        modules = dict(self.adapter.blocks(model))
        batches = self.enter(model, tokens)
        done: list[SitePruned] = []
        for index, planned in enumerate(plan.blocks):
            self.observe(BlockStarted(planned.name, index, len(plan.blocks)))
            module = modules[planned.name]
            with self.resident.open(planned.name, module):
                at = _Block(self.adapter, module, planned, index, batches)
                try:
                    done += self.turn(at)
                    if index + 1 < len(plan.blocks):
                        self.leave(at)
                except AptError as error:
                    raise AptError(f"in {planned.name}: {error.message}", error.hint) from error
        return done

    def turn(self, at: "_Block") -> list[SitePruned]:
        """Prune a block, or take it as an earlier run has left it."""
        name = at.planned.name
        if (known := self.resident.pruned(name)) is None:
            known = self.block(at)
            self.resident.keep(name, at.module, known)
            return known
        for batch in at.batches:
            if batch.reference is not None:
                call = batch.calls[at.index]
                batch.reference.state = self.adapter.step(at.module, batch.reference.state, call)
        self.resident.restore(name, at.module)
        for site in known:
            self.observe(site)
        return known

    def enter(self, model: nn.Module, tokens: Tensor) -> list[Batch]:
        """This rank's batches before the first block; those to tune on are small, and come first.

        Raises:
            AptError: a rank is left without any.
        """
        how, batches, rest = self.reconstruction, list[Batch](), tokens
        if how is not None:
            chosen = how.chosen(*tokens.shape)
            batches = self.batches(model, tokens[chosen], how.tokens_per_batch)
            self.tuned, rest = len(batches), tokens[~chosen]
        if len(rest):
            batches += self.batches(model, rest, TOKENS_PER_BATCH)
        if self.ranks.sum(not batches):
            raise AptError(
                f"{len(tokens)} samples leave some of {self.ranks.size} ranks without any",
                "give more --samples, or start fewer ranks",
            )
        self.ranks.work.tokens = sum(batch.tokens for batch in batches)
        return batches

    def batches(self, model: nn.Module, tokens: Tensor, size: int) -> list[Batch]:
        """This rank's batches of about ``size`` of ``tokens`` (samples, seqlen)."""
        aware = self.targets is not None
        size = min(size, math.ceil(len(tokens) / self.ranks.size) * tokens.shape[1])
        return enter(
            self.adapter, model, tokens, size, reference=aware, ranks=self.ranks, store=self.store
        )

    def block(self, at: "_Block") -> list[SitePruned]:
        """Prune a block."""
        at.scales = self.advance(at)
        done = self.ranks.share(self.extras(at))
        solved: list[_Solved] = []
        with closing(self.captured(at)) as groups:
            for group, sums in groups:
                for each in sums.values():
                    each.add_up(self.ranks)
                mean = _mean_square(sums[e.site.input].gram for e in group if e.site.routed)
                for turns in self.ranks.rounds(group):
                    solved += self.solve_round(at, turns, sums, mean)
                    if self.reconstruction is None:
                        done += self.finish(at.module, solved)
                        solved.clear()
        for batch in at.batches:
            if batch.reference is not None:
                batch.reference.inputs.clear()
        if self.reconstruction is not None and at.planned.pruned:
            self.tune(at, self.reconstruction)
            done += self.finish(at.module, solved)
        return done

    def advance(self, at: "_Block") -> dict[Site, Tensor]:
        """Take the dense stream through the block, and weigh the rows of what gains by it."""
        if self.targets is None:
            return {}
        how = self.importance
        wanted = [e.site for e in at.planned.pruned if how and how.serves(e.site, e.pattern)]
        first = at.first(how.tokens / self.ranks.size) if how and wanted else []
        starts = [batch.reference.state for batch in first if batch.reference]
        advance_reference(self.adapter, at.module, at.index, at.batches, at.sites, self.ranks)
        for batch in at.batches:
            assert batch.reference is not None
            _check_finite(batch.reference.state)
        if how is None or not wanted:
            return {}
        block = (self.adapter, at.module, at.index)
        return how.scales(*block, first, starts, wanted, self.ranks)

    def solve_round(
        self, at: "_Block", turns: dict[int, PlannedSite], sums: dict[str, Sums], mean: float
    ) -> list["_Solved"]:
        """Solve this rank's of some sites, by turn, and take over what the others solve."""
        own = [
            self.solve(at, turn, entry, sums[entry.site.input], mean)
            for turn, entry in turns.items()
            if self.ranks.owner(turn) == self.ranks.rank
        ]
        for turn, entry in turns.items():
            self.ranks.send(entry.site.weight(at.module).data, self.ranks.owner(turn))
        return own

    def extras(self, at: "_Block") -> list[SitePruned]:
        """Prune what is asked for beside the sites."""
        planned, done = at.planned.extras, []
        if not planned:
            return []
        args = (self.adapter, at.module, at.index, at.batches, planned, self.options)
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

        In order, a single walk through the block gives all, where inputs come whole.
        """
        left = list(at.planned.pruned)
        whole = not any(site.routed or site.calls > 1 for site in at.sites)
        if self.ordered and self.store.in_memory and whole and left:
            with suppress(InParts), at.walk() as walk:
                while (name := walk.next_input()) is not None:
                    sums = walk.capture(name)
                    group = [entry for entry in left if entry.site.input == name]
                    left = [entry for entry in left if entry.site.input != name]
                    yield group, {name: sums}
                at.left = self.reconstruction is None and not self.resident.repeatable
                walk.finish(leave=at.left)
        for group in self.groups(left):
            yield group, self.capture(at, [entry.site for entry in group])

    def tune(self, at: "_Block", how: Reconstruction) -> None:
        """Tune the block's kept weights."""
        sites = [entry.site for entry in at.planned.pruned]
        batches = at.batches[: self.tuned]
        tuned = reconstruct(self.adapter, at.module, at.index, batches, sites, how, self.ranks)
        if tuned is not None:
            self.observe(BlockTuned(at.planned.name, tuned.before, tuned.after))

    def capture(self, at: "_Block", sites: list[Site]) -> dict[str, Sums]:
        """The sums of the inputs of ``sites``, by the inputs' names, from a run of its own."""
        earlier = {}
        if self.targets is not None:
            last = max(site.order for site in sites)
            earlier = {site: weight for site, weight in at.dense.items() if site.order < last}
        capture = Capture(at.module, sites, reference=self.targets is not None)
        capture.run(self.adapter, at.module, at.index, at.batches, earlier)
        return capture.sums

    def groups(self, sites: Sequence[PlannedSite]) -> Iterable[list[PlannedSite]]:
        """The sites that are solved from one run of the block."""
        if not self.ordered:
            return [list(sites)] if sites else []
        by_order = sorted(sites, key=lambda entry: entry.site.order)
        return [list(group) for _, group in groupby(by_order, key=lambda entry: entry.site.order)]

    def solve(
        self, at: "_Block", turn: int, planned: PlannedSite, sums: Sums, mean: float
    ) -> "_Solved":
        """Solve one site and write it back in place; ``mean`` backs a routed one of few tokens."""
        assert planned.pattern is not None
        started, gram = time.perf_counter(), sums.gram
        tokens = gram.tokens
        if planned.site.routed:
            gram = gram.backed(mean)
        weight = planned.site.oriented(planned.site.weight(at.module).data)
        dense = weight.to(torch.float32, copy=True)
        scale = at.scales.get(planned.site, dense.new_ones(()))
        try:
            target = dense
            if self.targets is not None and not planned.site.routed:
                damped = gram.damped(self.options.damping)
                target = self.targets.weight(dense, planned.site, sums, damped)
            solution = self.method(target * scale, gram, planned.pattern, self.options)
        except SolverError as error:
            raise AptError(f"{planned.name} cannot be pruned: {error}") from error
        except Exception as error:
            error.add_note(f"while {planned.name} was pruned")
            raise
        _synchronise(weight.device)
        seconds = time.perf_counter() - started
        weight.copy_(solution.weight / scale)
        self.ranks.work.solves += 1
        self.ranks.work.solve_seconds += seconds
        return _Solved(turn, planned, dense, gram.matrix, tokens, solution, seconds)

    def finish(self, block: nn.Module, solved: Sequence["_Solved"]) -> list[SitePruned]:
        """Measure sites as they are written, each where it was solved, and tell of all."""
        own = [(each.turn, _measured(block, each)) for each in solved]
        turns = [pair for part in self.ranks.gather(own) for pair in part]
        done = [site for _, site in sorted(turns, key=itemgetter(0))]
        for site in done:
            self.observe(site)
        return done

    def leave(self, at: "_Block") -> None:
        """Replace every batch's state by what the pruned block makes of it."""
        for batch in at.batches:
            if not at.left:
                batch.state = self.adapter.step(at.module, batch.state, batch.calls[at.index])
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

    def walk(self) -> Walk:
        """A walk of all batches through it."""
        ahead = [entry.site for entry in self.planned.pruned]
        return Walk(
            self.adapter, self.module, self.index, self.batches, self.sites, ahead, self.dense
        )


@dataclass(frozen=True)
class _Solved:
    """A site that is solved and written, but may still be tuned."""

    turn: int
    planned: PlannedSite
    dense: Tensor
    matrix: Tensor
    tokens: int
    solution: Solution
    seconds: float


def _measured(block: nn.Module, solved: _Solved) -> SitePruned:
    """What was done to a site, as it is written."""
    planned, solution = solved.planned, solved.solution
    weight = planned.site.oriented(planned.site.weight(block).data)
    _check(planned, weight, solution.mask)
    return SitePruned(
        planned.name,
        planned.site.kind,
        planned.shape,
        str(planned.pattern),
        int((weight == 0).sum()),
        relative_layer_error(solved.dense, weight.float(), solved.matrix),
        solution.damping,
        solution.residual,
        solved.tokens,
        solved.seconds,
    )


def _mean_square(grams: Iterable[Gram]) -> float:
    """The mean square of an activation over all tokens of ``grams``; 1 where there is none."""
    sums = [(float(gram.matrix.diagonal().mean()), gram.tokens) for gram in grams]
    tokens = sum(count for _, count in sums)
    return sum(total for total, _ in sums) / tokens if tokens else 1.0


def _check_finite(state: State) -> None:
    """Raise where a block has made of its input what is not a number."""
    if isinstance(state, Tensor) and not torch.isfinite(state).all():
        raise AptError(
            "the activations after it are not finite",
            "try --dtype float32, or bfloat16 instead of float16",
        )


def _check(planned: PlannedSite, weight: Tensor, mask: Tensor) -> None:
    """Hold the weight as written against the mask and the pattern."""
    if not torch.isfinite(weight).all():
        raise AptError(
            f"the pruned weight of {planned.name} is not finite in {weight.dtype}",
            "try --dtype float32, or more --damping",
        )
    assert planned.pattern is not None
    if bool(weight[mask].any()) or not meets(weight, planned.pattern):
        raise RuntimeError(f"{planned.name}: the method did not meet {planned.pattern}")


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
