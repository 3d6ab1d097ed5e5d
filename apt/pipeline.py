"""The loop over blocks: capture, solve, write back, propagate."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Call, Site, State
from apt.capture import capture_grams
from apt.errors import AptError
from apt.plan import Plan, PlannedBlock, PlannedSite
from apt.solver import Gram, Pattern, Solution, SolverError, SolverOptions, relative_layer_error
from apt.solver.patterns import meets

TOKENS_PER_BATCH = 4096


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
        kind: its name within the block.
        shape: (out, in).
        pattern: the pattern asked for.
        zeros: the zeros now in the weight.
        relative_error: the relative layer error of the weight as written, in its own dtype.
        damping: the damping used; None where the method uses none.
        tokens: the calibration tokens in its Gram matrix.
        seconds: the time of the solve.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    pattern: str
    zeros: int
    relative_error: float
    damping: float | None
    tokens: int
    seconds: float

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.shape[0] * self.shape[1]


Event = BlockStarted | SitePruned
Observer = Callable[[Event], None]


@dataclass
class Batch:
    """The activations of some samples on their way through the blocks."""

    state: State
    calls: list[Call]


@torch.no_grad()
def prune_blocks(
    model: nn.Module,
    adapter: Adapter,
    plan: Plan,
    tokens: Tensor,
    method: Method,
    options: SolverOptions | None = None,
    *,
    ordered: bool = False,
    observe: Observer = lambda event: None,
) -> list[SitePruned]:
    """Prune ``model`` in place, one block after the other.

    Every block is run with its dense weights on what the pruned blocks before it give, its sites
    are solved from the Gram matrices of their inputs and written back, and it is run again.

    Args:
        model: the model, in eval mode while this runs.
        adapter: the adapter of its family.
        plan: what to do to each site, from `apt.plan.make_plan`.
        tokens: calibration token ids (samples, seqlen).
        method: the pruning method.
        options: the solver's options.
        ordered: within a block, solve the sites in their order of execution and capture each
            group's inputs anew, after the groups before it have been pruned.
        observe: called with each event as it happens.

    Raises:
        AptError: the tokens have another shape, activations are not finite, a site's inputs were
            not seen, or a solve failed.
    """
    if tokens.ndim != 2 or not tokens.numel():
        raise AptError(f"tokens have shape {tuple(tokens.shape)}", "give (samples, seqlen)")
    training = model.training
    model.eval()
    try:
        run = _Run(adapter, tokens.numel(), method, options or SolverOptions(), ordered, observe)
        return run.all(model, plan, tokens)
    finally:
        model.train(training)


@dataclass
class _Run:
    adapter: Adapter
    tokens: int
    method: Method
    options: SolverOptions
    ordered: bool
    observe: Observer

    def all(self, model: nn.Module, plan: Plan, tokens: Tensor) -> list[SitePruned]:
        modules = dict(self.adapter.blocks(model))
        batches = enter(self.adapter, model, tokens)
        done: list[SitePruned] = []
        for index, planned in enumerate(plan.blocks):
            self.observe(BlockStarted(planned.name, index, len(plan.blocks)))
            done += self.block(modules[planned.name], planned, index, batches)
            if index + 1 < len(plan.blocks):
                self.propagate(modules[planned.name], index, batches, planned.name)
        return done

    def block(
        self, block: nn.Module, planned: PlannedBlock, index: int, batches: list[Batch]
    ) -> list[SitePruned]:
        def run() -> None:
            for batch in batches:
                self.adapter.step(block, batch.state, batch.calls[index])

        done = []
        for group in self.groups(planned.pruned):
            sites: list[Site] = [entry.site for entry in group]
            try:
                grams = capture_grams(self.adapter, block, sites, run, self.tokens)
            except AptError as error:
                raise AptError(f"in {planned.name}: {error.message}", error.hint) from error
            done += [self.site(block, entry, grams[entry.site.input]) for entry in group]
        return done

    def groups(self, sites: Sequence[PlannedSite]) -> Iterable[list[PlannedSite]]:
        """The sites that are solved from one run of the block."""
        if not self.ordered:
            return [list(sites)] if sites else []
        by_order = sorted(sites, key=lambda entry: entry.site.order)
        return [list(group) for _, group in groupby(by_order, key=lambda entry: entry.site.order)]

    def site(self, block: nn.Module, planned: PlannedSite, gram: Gram) -> SitePruned:
        """Solve one site and write it back in place."""
        assert planned.pattern is not None
        started = time.perf_counter()
        weight = planned.site.oriented(planned.site.weight(block).data)
        dense = weight.to(torch.float32, copy=True)
        try:
            solution = self.method(dense, gram, planned.pattern, self.options)
        except SolverError as error:
            raise AptError(f"{planned.name} cannot be pruned: {error}") from error
        _synchronise(weight.device)
        seconds = time.perf_counter() - started
        weight.copy_(solution.weight)
        _check(planned, weight, solution.mask)
        pruned = SitePruned(
            planned.name,
            planned.site.name,
            planned.shape,
            str(planned.pattern),
            int((weight == 0).sum()),
            relative_layer_error(dense, weight.float(), gram.matrix),
            solution.damping,
            gram.tokens,
            seconds,
        )
        self.observe(pruned)
        return pruned

    def propagate(self, block: nn.Module, index: int, batches: list[Batch], name: str) -> None:
        """Replace every batch's state by what the pruned block makes of it."""
        for batch in batches:
            batch.state = self.adapter.step(block, batch.state, batch.calls[index])
            if isinstance(batch.state, Tensor) and not torch.isfinite(batch.state).all():
                raise AptError(
                    f"the activations after {name} are not finite",
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


def enter(adapter: Adapter, model: nn.Module, tokens: Tensor) -> list[Batch]:
    """The states before the first block, in batches of about `TOKENS_PER_BATCH` tokens.

    Masks and positions that are equal in all batches are kept once.
    """
    device = next(model.parameters()).device
    pool: list[Tensor] = []
    batches = []
    for part in torch.split(tokens, max(1, TOKENS_PER_BATCH // tokens.shape[1])):
        state, calls = adapter.enter(model, part.to(device))
        memo: dict[int, Tensor] = {}
        shared = [
            Call(_pooled(c.args, pool, memo), _pooled(c.kwargs, pool, memo), c.keyword)
            for c in calls
        ]
        batches.append(Batch(state, shared))
    return batches


def _pooled(value: Any, pool: list[Tensor], memo: dict[int, Tensor]) -> Any:
    """``value`` with every tensor in it replaced by an equal one from the pool, if there is one."""
    if isinstance(value, dict):
        return {key: _pooled(item, pool, memo) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_pooled(item, pool, memo) for item in value)
    if not isinstance(value, Tensor):
        return value
    if id(value) not in memo:
        memo[id(value)] = _from_pool(value, pool)
    return memo[id(value)]


def _from_pool(tensor: Tensor, pool: list[Tensor]) -> Tensor:
    for known in pool:
        if known.dtype == tensor.dtype and torch.equal(known, tensor):
            return known
    pool.append(tensor)
    return tensor
