"""The activations of the dense model, taken through a block beside those of the pruned one."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Site, State
from apt.calibration.batches import Batch, Inputs
from apt.distributed.ranks import Ranks


class _Keeper:
    """Keeps the inputs of a block's sites, each once."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._owners: dict[str, Site] = {}

    def keep(self, site: Site, rows: Tensor) -> None:
        """Keep what the first site of each input is given."""
        if self._owners.setdefault(site.input, site) == site:
            self._inputs.add(site.input, rows.reshape(-1, rows.shape[-1]))


def advance_dense(
    adapter: Adapter,
    block: nn.Module,
    index: int,
    batches: list[Batch],
    sites: Sequence[Site],
    ranks: Ranks | None = None,
    tell: Callable[[], None] = lambda: None,
) -> None:
    """Run the block, its weights still dense, on the dense stream; keep its sites' inputs.

    Told after each batch.
    """
    energy, ranks = 0.0, ranks or Ranks()
    for batch in batches:
        dense = batch.dense
        assert dense is not None
        stream = _stream(adapter, dense.state)
        dense.drift = stream - _stream(adapter, batch.state)
        squares = _sizes(stream)
        dense.scale = squares.sqrt()
        energy += float(squares.reciprocal().sum())
        dense.inputs.clear()
        keep = _Keeper(dense.inputs).keep
        with adapter.capture(block, [site for site in sites if not site.routed], keep):
            dense.state = adapter.step(block, dense.state, batch.calls[index])
        tell()
    tokens = ranks.sum(sum(batch.tokens for batch in batches))
    mean = math.sqrt(tokens / ranks.sum(energy))
    for batch in batches:
        assert batch.dense is not None
        assert batch.dense.scale is not None
        batch.dense.scale /= mean


def _sizes(stream: Tensor) -> Tensor:
    """The mean square of every token (tokens, 1), so bounded that none outweighs all others."""
    squares = stream.square().mean(1, keepdim=True)
    least = max(float(squares.median()) / 16, torch.finfo(squares.dtype).tiny)
    return squares.clamp(min=least)


def _stream(adapter: Adapter, state: State) -> Tensor:
    """The residual stream (tokens, hidden) in fp32."""
    stream = adapter.residual(state)
    return stream.float().reshape(-1, stream.shape[-1])
