"""The calibration activations on their way through the blocks, in batches."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Call, State
from apt.calibration.storage import InStore, MemoryStore, Store, mapped
from apt.distributed.ranks import Ranks

TOKENS_PER_BATCH = 4096


class DenseActivations:
    """The same samples on their way through the dense model.

    Attributes:
        state: what flows into the block.
        inputs: of the block at hand, the inputs (tokens, in) by name; in several parts where they
            are multiplied so.
        drift: how far the pruned model's residual stream (tokens, hidden) has drifted from the
            dense one's where the block begins: dense minus pruned.
        scale: of every token (tokens, 1), what its error on the stream is divided by: the root
            mean square of the dense stream before the block, in units in which the inverse squares
            average 1.
        store: where all but the last lie.
    """

    state = InStore[State]()
    drift = InStore[Tensor | None]()

    def __init__(self, state: State, store: Store | None = None) -> None:
        self.store = store or MemoryStore()
        self.state, self.drift = state, None
        self.inputs = Inputs(self.store)
        self.scale: Tensor | None = None


class Inputs(Mapping[str, list[Tensor]]):
    """What a block's sites are fed with, by name, in parts that lie in a ``store``."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._parts: dict[str, list[Any]] = {}

    def add(self, name: str, part: Tensor) -> None:
        """Take one more part of an input."""
        self._parts.setdefault(name, []).append(self._store.put(part))

    def clear(self) -> None:
        """Let go of all."""
        self._parts.clear()

    def __getitem__(self, name: str) -> list[Tensor]:
        return [self._store.get(part) for part in self._parts[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


class Batch:
    """The activations of some samples.

    Attributes:
        state: what flows into the block.
        calls: how every block is called.
        tokens: the number of tokens.
        dense: the activations of the dense model, where they are carried along.
        store: where the state lies.
    """

    state = InStore[State]()

    def __init__(
        self,
        state: State,
        calls: list[Call],
        tokens: int,
        dense: DenseActivations | None = None,
        store: Store | None = None,
    ) -> None:
        self.store = store or MemoryStore()
        self.state, self.calls, self.tokens, self.dense = state, calls, tokens, dense


def enter(
    adapter: Adapter,
    model: nn.Module,
    tokens: Tensor,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    *,
    with_dense: bool = False,
    ranks: Ranks | None = None,
    store: Store | None = None,
) -> list[Batch]:
    """The states before the first block, in batches of some samples.

    Masks and positions that are equal in all batches are kept once.

    Args:
        adapter: the model's adapter.
        model: the model.
        tokens: token ids (samples, seqlen).
        tokens_per_batch: about how many tokens make a batch, which is one sample at least.
        with_dense: whether the activations of the dense model are carried along.
        ranks: those that the batches are dealt out to in turn.
        store: where the activations lie while no block is run on them; None for in memory.
    """
    device = next(model.parameters()).device
    pool: list[Tensor] = []
    batches = []
    parts = torch.split(tokens, max(1, tokens_per_batch // tokens.shape[1]))
    for part in (ranks or Ranks()).mine(parts):
        state, calls = adapter.enter(model, part.to(device))
        memo: dict[int, Tensor] = {}

        def pooled(tensor: Tensor, memo: dict[int, Tensor] = memo) -> Tensor:
            if id(tensor) not in memo:
                memo[id(tensor)] = _from_pool(tensor, pool)
            return memo[id(tensor)]

        shared = [
            Call(mapped(c.args, Tensor, pooled), mapped(c.kwargs, Tensor, pooled), c.keyword)
            for c in calls
        ]
        beside = DenseActivations(state, store) if with_dense else None
        batches.append(Batch(state, shared, part.numel(), beside, store))
    return batches


def _from_pool(tensor: Tensor, pool: list[Tensor]) -> Tensor:
    for known in pool:
        if known.dtype == tensor.dtype and torch.equal(known, tensor):
            return known
    pool.append(tensor)
    return tensor
