"""Permutations before n:m: inputs change places, and each group keeps larger weights."""

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor

from apt.adapter import Permutable, Site
from apt.adapter.groups import tensors_of
from apt.adapter.permutations import columns_of
from apt.calibration.batches import Batch, OpenBlock
from apt.patterns import Pattern
from apt.planning.plan import PlannedBlock, PlannedSite
from apt.solver.permutation import best_order


def permuted_experts(planned: PlannedBlock) -> list[Site]:
    """The sites of experts whose inputs change places."""
    return [entry.site for entry, _ in _permuted_sites(planned) if entry.site.routed]


def permute_inputs(
    block: OpenBlock,
    planned: PlannedBlock,
    dense: dict[Site, Tensor],
    squares: Mapping[Site, Tensor],
) -> dict[str, Tensor]:
    """Change the places of the permutable inputs of a block whose sites are dense.

    The scores of the weights are ``w² ‖x‖²``, with the inputs of the dense stream. Inputs have the
    same weighting of tokens as the errors on this stream.

    Args:
        block: the block; its recorded dense inputs change places too.
        planned: its sites and permutable inputs.
        dense: dense weights (out, in) by site, whose columns change places too.
        squares: the sums of the squares of the inputs (in,) of `permuted_experts`.

    Returns:
        The former column of each column (in,), by the full name of the site.
    """
    orders, parameters = dict[str, Tensor](), tensors_of(block.module)
    for entry, permutable in _permuted_sites(planned):
        site = entry.site
        energy = squares[site] if site.routed else _input_energy(block, site)
        local_order = _best_order(block, permutable, entry, energy)
        # Devices differ between ranks.
        order = block.ranks.share(local_order.cpu()).to(local_order.device)
        permutable.permute(parameters, order)
        part = columns_of(permutable, site)
        assert part is not None
        orders[entry.name] = columns = permutable.places(part, order)
        if site in dense:
            dense[site] = dense[site][:, columns]
        if site.routed:  # its inputs are not recorded
            continue
        for batch in block.batches:
            assert batch.dense is not None
            batch.dense.inputs.permute(site.input, columns)
    return orders


def _permuted_sites(planned: PlannedBlock) -> Iterator[tuple[PlannedSite, Permutable]]:
    """The permutable inputs of n:m sites, without sites that an allocation left dense."""
    entries = {entry.site.name: entry for entry in planned.sites}
    for permutable in planned.permutable:
        entry = entries[permutable.reader]
        if entry.pattern is not None:
            yield entry, permutable


def _best_order(
    block: OpenBlock, permutable: Permutable, entry: PlannedSite, energy: Tensor
) -> Tensor:
    """The best order of the permutable inputs of a site, by their sums of squares (in,)."""
    pattern, size = cast(Pattern, entry.pattern), permutable.size
    weight = entry.site.oriented(entry.site.weight(block.module).data).float()
    if not energy.any():  # an expert without tokens
        energy = torch.ones_like(energy)
    scores = (weight.square() * energy).view(len(weight), permutable.bins, -1, size)
    bins = scores.permute(1, 2, 0, 3).reshape(permutable.bins, -1, size)
    orders = [
        best_order(bin_scores, pattern) + size * index for index, bin_scores in enumerate(bins)
    ]
    return torch.cat(orders)


def _input_energy(block: OpenBlock, site: Site) -> Tensor:
    """The sums of the squares of the dense inputs (in,) of a site over the tokens of all ranks."""
    weight = site.oriented(site.weight(block.module).data)
    energy = torch.zeros(weight.shape[1], device=weight.device)
    for batch in block.batches:
        for rows in _weighted_inputs(batch, site):
            energy += rows.square().sum(0)
    block.ranks.add(energy)
    return energy


def _weighted_inputs(batch: Batch, site: Site) -> Iterator[Tensor]:
    """The dense inputs of a site; divided by the sizes of the tokens if its errors are."""
    assert batch.dense is not None
    parts, scale = batch.dense.inputs[site.input], batch.dense.scale
    if not site.residual or scale is None or site.calls > 1:
        yield from (rows.float() for rows in parts)
        return
    sizes = torch.split(scale, [len(rows) for rows in parts])
    for rows, size in zip(parts, sizes, strict=True):
        yield rows.float() / size
