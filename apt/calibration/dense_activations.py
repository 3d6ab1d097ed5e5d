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
    """Run the dense block on the dense stream, and record the inputs of its sites.

    Args:
        block: the block.
        sites: the sites of the block; the inputs of sites that are not routed are recorded.
        summed: routed sites, whose squared inputs are summed.

    Returns:
        The sums of the squares of the inputs (in,) of ``summed`` over the tokens of all ranks.
    """
    inverse_squares, recorded = list[Tensor](), [site for site in sites if not site.routed]
    sums = {site: _zero_sum(site, block.module) for site in summed}
    for batch in block.batches:
        dense = batch.dense
        assert dense is not None
        stream = stream_rows(block.adapter, dense.state)
        dense.drift = stream - stream_rows(block.adapter, batch.state)
        squares = mean_squares(stream)
        dense.scale = squares.sqrt()
        inverse_squares.append(squares.reciprocal().sum())
        dense.inputs.clear()

        def add(site: Site, rows: Tensor, inputs: Inputs = dense.inputs) -> None:
            if site in sums:
                sums[site] += rows.reshape(-1, rows.shape[-1]).float().square().sum(0)
            else:
                inputs.record(site, rows)

        with block.adapter.capture(block.module, [*recorded, *sums], add):
            dense.state = block.step_dense(batch)
        block.progress()
    for total in sums.values():
        block.ranks.add(total)
    tokens = block.ranks.sum(sum(batch.tokens for batch in block.batches))
    inverse_sum = sum(torch.stack(inverse_squares).tolist())  # one wait for a device
    mean = math.sqrt(tokens / block.ranks.sum(inverse_sum))
    for batch in block.batches:
        assert batch.dense is not None
        assert batch.dense.scale is not None
        batch.dense.scale /= mean
    return sums


def _zero_sum(site: Site, block: nn.Module) -> Tensor:
    """Zeros (in,) in fp32 for the inputs of a site."""
    weight = site.oriented(site.weight(block))
    return torch.zeros(weight.shape[1], device=weight.device)


def mean_squares(stream: Tensor) -> Tensor:
    """The mean square of every token (tokens, 1) of a stream (tokens, hidden), `bounded`."""
    return bounded(stream.square().mean(1, keepdim=True))


def bounded(squares: Tensor) -> Tensor:
    """Squared sizes of tokens as divisors: bounded below, so that no small token dominates.

    All are 1 if most tokens are zero, as the queries are before the first block of DETR's decoder.
    """
    least = squares.median() / 16
    tiny = torch.finfo(squares.dtype).tiny
    return torch.where(least > 0, squares.clamp(min=least.clamp(min=tiny)), 1.0)


def stream_rows(adapter: Adapter, state: State) -> Tensor:
    """The residual stream (tokens, hidden) in fp32."""
    stream = adapter.residual(state)
    return stream.float().reshape(-1, stream.shape[-1])
