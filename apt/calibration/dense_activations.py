"""The pass of the dense model's activations through a block."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from apt.adapter import Adapter, Site, State
from apt.calibration.batches import OpenBlock


def advance_dense(block: OpenBlock, sites: Sequence[Site]) -> None:
    """Run the block, its weights still dense, on the dense stream; record its sites' inputs."""
    energies, recorded = list[Tensor](), [site for site in sites if not site.routed]
    for batch in block.batches:
        dense = batch.dense
        assert dense is not None
        stream = stream_rows(block.adapter, dense.state)
        dense.drift = stream - stream_rows(block.adapter, batch.state)
        squares = mean_squares(stream)
        dense.scale = squares.sqrt()
        energies.append(squares.reciprocal().sum())
        dense.inputs.clear()
        with block.adapter.capture(block.module, recorded, dense.inputs.record):
            dense.state = block.step(batch, dense.state)
        block.progress()
    tokens = block.ranks.sum(sum(batch.tokens for batch in block.batches))
    energy = sum(torch.stack(energies).tolist())  # one wait for a device
    mean = math.sqrt(tokens / block.ranks.sum(energy))
    for batch in block.batches:
        assert batch.dense is not None
        assert batch.dense.scale is not None
        batch.dense.scale /= mean


def mean_squares(stream: Tensor) -> Tensor:
    """The mean square of every token (tokens, 1) of a stream (tokens, hidden), `bounded`."""
    return bounded(stream.square().mean(1, keepdim=True))


def bounded(squares: Tensor) -> Tensor:
    """The squared sizes of tokens, bounded below as divisors: no token, even zero, may dominate."""
    least = (squares.median() / 16).clamp(min=torch.finfo(squares.dtype).tiny)
    return squares.clamp(min=least)


def stream_rows(adapter: Adapter, state: State) -> Tensor:
    """The residual stream (tokens, hidden) in fp32."""
    stream = adapter.residual(state)
    return stream.float().reshape(-1, stream.shape[-1])
