"""The calibration activations on their way through the blocks, in batches."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Call, State
from apt.ranks import Ranks

TOKENS_PER_BATCH = 4096


@dataclass
class Reference:
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
    """

    state: State
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    drift: Tensor | None = None
    scale: Tensor | None = None


@dataclass
class Batch:
    """The activations of some samples.

    Attributes:
        state: what flows into the block.
        calls: how every block is called.
        tokens: the number of tokens.
        reference: the dense stream beside it, where there is one.
    """

    state: State
    calls: list[Call]
    tokens: int
    reference: Reference | None = None


def enter(
    adapter: Adapter,
    model: nn.Module,
    tokens: Tensor,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    *,
    reference: bool = False,
    ranks: Ranks | None = None,
) -> list[Batch]:
    """The states before the first block, in batches of some samples.

    Masks and positions that are equal in all batches are kept once.

    Args:
        adapter: the model's adapter.
        model: the model.
        tokens: token ids (samples, seqlen).
        tokens_per_batch: about how many tokens make a batch, which is one sample at least.
        reference: whether a dense stream begins beside each batch.
        ranks: those that the batches are dealt out to in turn.
    """
    device = next(model.parameters()).device
    pool: list[Tensor] = []
    batches = []
    parts = torch.split(tokens, max(1, tokens_per_batch // tokens.shape[1]))
    for part in (ranks or Ranks()).mine(parts):
        state, calls = adapter.enter(model, part.to(device))
        memo: dict[int, Tensor] = {}
        shared = [
            Call(_pooled(c.args, pool, memo), _pooled(c.kwargs, pool, memo), c.keyword)
            for c in calls
        ]
        batches.append(Batch(state, shared, part.numel(), Reference(state) if reference else None))
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
