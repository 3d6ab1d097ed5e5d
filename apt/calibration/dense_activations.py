"""The pass of the dense model's activations through a block."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Site, State
from apt.calibration.batches import Inputs, OpenBlock


def advance_dense(
    block: OpenBlock, sites: Sequence[Site], summed: Sequence[Site] = ()
) -> dict[Site, Tensor]:
    """Run the block, its weights still dense, on the dense stream; record its sites' inputs.

    Args:
        block: the block.
        sites: its sites; the inputs of those that are not routed are recorded.
        summed: routed sites.

    Returns:
        The sums of the squares of the inputs (in,) of ``summed`` over the tokens of all ranks.
    """
    energies, recorded = list[Tensor](), [site for site in sites if not site.routed]
    sums = {site: _zeros(site, block.module) for site in summed}
    for batch in block.batches:
        dense = batch.dense
        assert dense is not None
        stream = stream_rows(block.adapter, dense.state)
        dense.drift = stream - stream_rows(block.adapter, batch.state)
        squares = mean_squares(stream)
        dense.scale = squares.sqrt()
        energies.append(squares.reciprocal().sum())
        dense.inputs.clear()

        def take(site: Site, rows: Tensor, inputs: Inputs = dense.inputs) -> None:
            if site in sums:
                sums[site] += rows.reshape(-1, rows.shape[-1]).float().square().sum(0)
            else:
                inputs.record(site, rows)

        with block.adapter.capture(block.module, [*recorded, *sums], take):
            dense.state = block.step(batch, dense.state)
        block.progress()
    for each in sums.values():
        block.ranks.add(each)
    tokens = block.ranks.sum(sum(batch.tokens for batch in block.batches))
    energy = sum(torch.stack(energies).tolist())  # one wait for a device
    mean = math.sqrt(tokens / block.ranks.sum(energy))
    for batch in block.batches:
        assert batch.dense is not None
        assert batch.dense.scale is not None
        batch.dense.scale /= mean
    return sums


def _zeros(site: Site, block: nn.Module) -> Tensor:
    """A zero in fp32 for each input of a site."""
    weight = site.oriented(site.weight(block))
    return torch.zeros(weight.shape[1], device=weight.device)


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
