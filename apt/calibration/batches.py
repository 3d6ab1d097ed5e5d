"""The calibration activations between two blocks, in batches."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Call, Site, State, Unrouted
from apt.calibration.storage import InStore, MemoryStore, Store, mapped
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
        store: the store of all attributes but ``scale``.
    """

    state = InStore[State]()
    drift = InStore[Tensor | None]()
    gap = InStore[Tensor | None]()

    def __init__(self, state: State, store: Store | None = None) -> None:
        self.store = store or MemoryStore()
        self.state, self.drift, self.gap, self.gap_input = state, None, None, ""
        self.inputs = Inputs(self.store)
        self.scale: Tensor | None = None


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
    ) -> None:
        self.store = store or MemoryStore()
        self.state, self.calls, self.tokens, self.dense = state, calls, tokens, dense
        self.sample, self.sources = sample, sources

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

    def step(self, batch: Batch, state: State) -> State:
        """The state after the block, from a state of a batch before it."""
        with self.routed():
            return self.adapter.step(self.module, state, batch.calls[self.index])

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
        return OpenBlock(*same, progress, self.unrouted, self.sources, self.mixed)


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
    tokens: Tensor,
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
        tokens: token ids (samples, seqlen).
        tokens_per_batch: the approximate number of tokens in a batch; a batch has at least one
            sample.
        with_dense: True if the activations of the dense model are needed as well.
        ranks: the processes among which the batches are distributed in turn.
        store: the store of the activations between runs of blocks; None keeps them in memory.
        sources: the index of the source of each sample (samples,); None if there is one source.
    """
    device = next(model.parameters()).device
    pool: list[Tensor] = []
    batches = []
    size, ranks = max(1, tokens_per_batch // tokens.shape[1]), ranks or Ranks()
    whole = torch.zeros(len(tokens), dtype=torch.long) if sources is None else sources
    parts = zip(torch.split(tokens, size), torch.split(whole, size), strict=True)
    for part, of in ranks.mine(list(parts)):
        state, calls = adapter.enter(model, part.to(device))
        memo: dict[int, Tensor] = {}

        def pooled(tensor: Tensor, memo: dict[int, Tensor] = memo) -> Tensor:
            if id(tensor) not in memo:
                memo[id(tensor)] = _from_pool(tensor, pool)
            return memo[id(tensor)]

        shared = [
            replace(c, args=mapped(c.args, Tensor, pooled), kwargs=mapped(c.kwargs, Tensor, pooled))
            for c in calls
        ]
        dense = DenseActivations(state, store) if with_dense else None
        each = None if sources is None else of.repeat_interleave(part.shape[1])
        batches.append(Batch(state, shared, part.numel(), dense, store, part.shape[1], each))
    return batches


def _from_pool(tensor: Tensor, pool: list[Tensor]) -> Tensor:
    for pooled in pool:
        if pooled.dtype == tensor.dtype and torch.equal(pooled, tensor):
            return pooled
    pool.append(tensor)
    return tensor
