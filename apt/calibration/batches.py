"""The calibration activations between two blocks, in batches."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Call, ModelInputs, Samples, Site, State, Unrouted
from apt.adapter.samples import on_device
from apt.calibration.storage import InStore, MemoryStore, Store, mapped
from apt.compute import if_it_runs, mixed_precision
from apt.distributed.ranks import Ranks
from apt.errors import AptError

TOKENS_PER_BATCH = 4096


class DenseActivations:
    """The activations of the same samples in the dense model.

    Attributes:
        inputs: the inputs (tokens, in) of the block's sites, by name; in several parts if the
            block multiplies them in parts.
        drift: the drift of the residual stream (tokens, hidden) before the block: that of the
            dense model minus that of the pruned model.
        scale: the divisor of every token's error on the stream (tokens, 1): the root mean square of
            the dense stream before the block, scaled so that the inverse squares average 1.
        gap: for the block before a gap, the sum (tokens, hidden) that the dropped blocks behind it
            add to the residual stream; None for other blocks.
        gap_input: the name of the input of the sites that take over the gap.
        calls: the call of every block, if they are other calls than those of the pruned model.
        ends: the states after the stacks that the model has passed.
        store: the store of all attributes but ``scale``, ``calls`` and ``ends``.
    """

    state = InStore[State]()
    drift = InStore[Tensor | None]()
    gap = InStore[Tensor | None]()

    def __init__(self, state: State, store: Store | None = None) -> None:
        self.store = store or MemoryStore()
        self.state, self.drift, self.gap, self.gap_input = state, None, None, ""
        self.inputs = Inputs(self.store)
        self.scale: Tensor | None = None
        self.calls: list[Call] | None = None
        self.ends: list[State] = []


class Inputs(Mapping[str, list[Tensor]]):
    """The inputs of a block's sites, by name, as lists of parts in ``store``."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._parts: dict[str, list[Any]] = {}
        self._owners: dict[str, Site] = {}

    def record(self, site: Site, rows: Tensor) -> None:
        """Append a part (…, in) of an input if ``site`` is the first site of the input."""
        if self._owners.setdefault(site.input, site) == site:
            part = self._store.put(rows.reshape(-1, rows.shape[-1]))
            self._parts.setdefault(site.input, []).append(part)

    def clear(self) -> None:
        """Remove all inputs."""
        self._parts.clear()
        self._owners.clear()

    def keep(self, names: Collection[str]) -> None:
        """Remove all inputs except those in ``names``."""
        self._parts = {name: parts for name, parts in self._parts.items() if name in names}

    def permute(self, name: str, order: Tensor) -> None:
        """Put the columns of an input into an order (in,)."""
        parts = [self._store.get(part) for part in self._parts[name]]
        self._parts[name] = [self._store.put(part[:, order]) for part in parts]

    def __getitem__(self, name: str) -> list[Tensor]:
        return [self._store.get(part) for part in self._parts[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


class Batch:
    """The activations of some samples in the pruned model.

    Attributes:
        state: the state before the block.
        calls: the call of every block.
        tokens: the number of tokens.
        sample: the number of tokens in each sample; None if the batch is one sample.
        dense: the activations of the dense model; None if they are not computed.
        store: the store of the state.
        sources: the index of the source of each token (tokens,), on the CPU; None if there is one.
        inputs: the inputs of the model.
        ends: the states after the stacks that the model has passed.
        passed: the number of tokens of each of these stacks.
    """

    state = InStore[State]()

    def __init__(
        self,
        state: State,
        calls: list[Call],
        tokens: int,
        dense: DenseActivations | None = None,
        store: Store | None = None,
        sample: int | None = None,
        sources: Tensor | None = None,
        inputs: ModelInputs | None = None,
    ) -> None:
        self.store = store or MemoryStore()
        self.state, self.calls, self.tokens, self.dense = state, calls, tokens, dense
        self.sample, self.sources, self.inputs = sample, sources, inputs
        self.ends: list[State] = []
        self.passed: list[int] = []

    def tokens_of(self, site: Site) -> int:
        """The number of tokens that a site multiplies in one call."""
        return self.passed[site.stack] if site.crossing else self.tokens

    def token_sources(self) -> Tensor:
        """The index of the source of each token (tokens,)."""
        if self.sources is None:
            return torch.zeros(self.tokens, dtype=torch.long)
        return self.sources


@dataclass
class OpenBlock:
    """A block in memory, with the batches before it.

    Attributes:
        index: its index in the model.
        batches: this rank's batches.
        ranks: the processes that have the other batches.
        progress: called after each run of the block on a batch.
        unrouted: the masks of the experts that its routers no longer choose, see `Unrouted`.
        sources: the names of the sources of the tokens.
        mixed: the number of these sources that are mixed on purpose.
        autocast: autocast for the runs of the block; it may do nothing.
    """

    adapter: Adapter
    module: nn.Module
    index: int
    batches: list[Batch]
    ranks: Ranks = field(default_factory=Ranks)
    progress: Callable[[], None] = lambda: None
    unrouted: Mapping[Tensor, Tensor] = field(default_factory=dict)
    sources: tuple[str, ...] = ("calibration",)
    mixed: int = 1
    autocast: torch.autocast = field(default_factory=lambda: torch.autocast("cpu", enabled=False))

    def step(self, batch: Batch, state: State) -> State:
        """The state after the block, from a state of a batch before it."""
        return self._run(state, batch.calls[self.index])

    def step_dense(self, batch: Batch) -> State:
        """The state of the dense stream after the block, from its state before it."""
        assert batch.dense is not None
        return self._run(batch.dense.state, dense_call(batch, self.index))

    def _run(self, state: State, call: Call) -> State:
        """The state after the block. The state of an fp32 model is fp32, also under autocast."""
        with self.routed(), self.autocast:
            after = self.adapter.step(self.module, state, call)
        return mapped(after, Tensor, _as_fp32) if self.autocast._enabled else after

    def routed(self) -> AbstractContextManager[Any]:
        """Inside the context, the routers do not choose the experts of ``unrouted``."""
        return Unrouted(self.unrouted) if self.unrouted else nullcontext()

    def first_batches(self, tokens: float) -> list[Batch]:
        """The first batches, with about ``tokens`` tokens together; at least one."""
        return self.batches[: 1 + int((tokens - 1) // self.batches[0].tokens)]

    def using(
        self, batches: list[Batch], progress: Callable[[], None] | None = None
    ) -> "OpenBlock":
        """The same block, with other batches."""
        progress = progress or self.progress
        same = (self.adapter, self.module, self.index, batches, self.ranks)
        return OpenBlock(*same, progress, self.unrouted, self.sources, self.mixed, self.autocast)


def autocast_of(block: OpenBlock, compute: str) -> torch.autocast:
    """Autocast for the runs of a block; it does nothing if the block does not run in it.

    Args:
        compute: the name of the dtype of products with fp32 weights, see `mixed_precision`.
    """

    def run_first() -> None:
        for batch in block.batches[:1]:
            with block.routed():
                block.adapter.step(block.module, batch.state, batch.calls[block.index])
            block.progress()

    return if_it_runs(mixed_precision(block.module.parameters(), compute, cache=False), run_first)


def _as_fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def check_finite(adapter: Adapter, states: Iterable[State], ranks: Ranks) -> None:
    """Raise on all ranks if a state of any rank after a block is not finite."""
    finite = [adapter.residual(state).isfinite().all() for state in states]
    if ranks.sum(bool(finite) and not torch.stack(finite).all()):  # one wait for a device
        message = "the activations after it are not finite"
        raise AptError(
            message, "compute in float32, or in bfloat16 instead of float16", ("compute",)
        )


def enter(
    adapter: Adapter,
    model: nn.Module,
    tokens: Tensor | Samples,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    *,
    with_dense: bool = False,
    ranks: Ranks | None = None,
    store: Store | None = None,
    sources: Tensor | None = None,
) -> list[Batch]:
    """The states before the first block, in batches of some samples.

    Masks and positions that are equal in all batches are stored once.

    Args:
        adapter: the model's adapter.
        model: the model.
        tokens: token ids (samples, seqlen), or other samples.
        tokens_per_batch: the approximate number of tokens in a batch; a batch has at least one
            sample.
        with_dense: True if the activations of the dense model are needed as well.
        ranks: the processes among which the batches are distributed in turn.
        store: the store of the activations between runs of blocks; None keeps them in memory.
        sources: the index of the source of each sample (samples,); None if there is one source.
    """
    device = next(model.parameters()).device
    pool: list[Tensor] = []
    batches, ranks = [], ranks or Ranks()
    for part, of in ranks.mine(_parts(tokens, tokens_per_batch, sources)):
        state, calls = adapter.enter(model, on_device(part, device))
        dense = DenseActivations(state, store) if with_dense else None
        rows, samples = _rows(adapter, part, state), len(of)
        each = None if sources is None else of.repeat_interleave(rows // samples)
        calls = _pooled(calls, pool)
        batches.append(Batch(state, calls, rows, dense, store, rows // samples, each, part))
    return batches


def enter_next(
    adapter: Adapter,
    model: nn.Module,
    batches: Iterable[Batch],
    dense_outer: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Let batches whose states are those after a stack go on before the next stack.

    The next stack reads the states after the earlier ones: those of the pruned model in the pruned
    stream, and those of the dense model in the dense stream.

    Args:
        dense_outer: a context in which the parameters outside the blocks are dense.
    """
    device, pool = next(model.parameters()).device, list[Tensor]()

    def entered(batch: Batch, ends: list[State]) -> tuple[State, list[Call]]:
        assert batch.inputs is not None
        state, calls = adapter.enter_next(model, on_device(batch.inputs, device), ends)
        return state, _pooled(calls, pool)

    for batch in batches:
        batch.ends.append(batch.state)
        samples = batch.tokens // (batch.sample or batch.tokens)
        before = batch.calls
        batch.state, calls = entered(batch, batch.ends)
        batch.calls = [*before, *calls]
        batch.passed.append(batch.tokens)
        batch.tokens = _rows(adapter, batch.inputs, batch.state)
        batch.sample = batch.tokens // samples
        batch.sources = None
        if (dense := batch.dense) is not None:
            dense.ends.append(dense.state)
            with dense_outer():
                dense.state, calls = entered(batch, dense.ends)
            dense.calls = [*(dense.calls or before), *calls]


def walk(
    adapter: Adapter, model: nn.Module, *groups: Sequence[Batch]
) -> Iterator[tuple[int, str, nn.Module]]:
    """The index, name and module of every block in order, with batches before the block.

    The caller runs the batches through a block, before it asks for the next one. Before the first
    block of a later stack, the batches of all groups enter that stack.
    """
    index = 0
    for number, (_, blocks) in enumerate(adapter.stacks(model)):
        for batches in groups if number else ():
            enter_next(adapter, model, batches)
        for name, block in blocks:
            yield index, name, block
            index += 1


def dense_call(batch: Batch, index: int) -> Call:
    """The call of a block in the dense stream."""
    assert batch.dense is not None
    return (batch.dense.calls or batch.calls)[index]


def _parts(
    tokens: Tensor | Samples, size: int, sources: Tensor | None
) -> list[tuple[ModelInputs, Tensor]]:
    """The inputs of batches of about ``size`` positions, and the source of each sample."""
    of = torch.zeros(len(tokens), dtype=torch.long) if sources is None else sources
    if isinstance(tokens, Samples):
        return [(inputs, of[chosen]) for inputs, chosen in tokens.batches(size)]
    samples = max(1, size // tokens.shape[1])
    return list(zip(torch.split(tokens, samples), torch.split(of, samples), strict=True))


def _rows(adapter: Adapter, inputs: ModelInputs | None, state: State) -> int:
    """The number of rows that each site of the blocks multiplies."""
    if isinstance(inputs, Tensor):  # the stream may have further dimensions, as in Gemma 3n
        return inputs.numel()
    return math.prod(adapter.residual(state).shape[:-1])


def _pooled(calls: Sequence[Call], pool: list[Tensor]) -> list[Call]:
    """The same calls, with one tensor for equal tensors of all calls."""
    memo: dict[int, Tensor] = {}

    def pooled(tensor: Tensor) -> Tensor:
        if id(tensor) not in memo:
            memo[id(tensor)] = _from_pool(tensor, pool)
        return memo[id(tensor)]

    return [
        replace(c, args=mapped(c.args, Tensor, pooled), kwargs=mapped(c.kwargs, Tensor, pooled))
        for c in calls
    ]


def _from_pool(tensor: Tensor, pool: list[Tensor]) -> Tensor:
    for pooled in pool:
        if pooled.dtype == tensor.dtype and torch.equal(pooled, tensor):
            return pooled
    pool.append(tensor)
    return tensor
