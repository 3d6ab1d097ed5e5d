"""Permutations before n:m: inputs change places so that each group keeps more."""

from collections.abc import Iterator

import torch
from torch import Tensor

from apt.adapter import Permutable, Site
from apt.adapter.groups import tensors_of
from apt.adapter.permutations import columns_of
from apt.calibration.batches import Batch, OpenBlock
from apt.planning.plan import PlannedBlock, PlannedSite
from apt.solver import NM
from apt.solver.permutation import best_order


def permute_inputs(
    block: OpenBlock, planned: PlannedBlock, dense: dict[Site, Tensor]
) -> dict[str, Tensor]:
    """Change the places of the permutable inputs of a block whose sites are dense.

    The scores of the weights are ``w² ‖x‖²``, with the inputs of the dense stream, weighted as the
    errors on this stream are.

    Args:
        block: the block; its recorded dense inputs change places too.
        planned: its sites and permutable inputs.
        dense: dense weights (out, in) by site, whose columns change places too.

    Returns:
        The former column of each column (in,), by the full name of the site.
    """
    orders = dict[str, Tensor]()
    entries = {entry.site.name: entry for entry in planned.sites}
    for permutable in planned.permutable:
        entry = entries[permutable.reader]
        if not isinstance(entry.pattern, NM):  # an allocation may have left it dense
            continue
        own = _order(block, permutable, entry, entry.pattern)
        order = block.ranks.share(own.cpu()).to(own.device)  # another rank has another device
        permutable.permute(tensors_of(block.module), order)
        part = columns_of(permutable, entry.site)
        assert part is not None
        columns = permutable.places(part, order)
        for batch in block.batches:
            assert batch.dense is not None
            batch.dense.inputs.permute(entry.site.input, columns)
        if entry.site in dense:
            dense[entry.site] = dense[entry.site][:, columns]
        orders[entry.name] = columns
    return orders


def _order(block: OpenBlock, permutable: Permutable, entry: PlannedSite, pattern: NM) -> Tensor:
    """The best order of the permutable inputs of a site."""
    site, size = entry.site, permutable.size
    weight = site.oriented(site.weight(block.module).data).float()
    energy = weight.new_zeros(weight.shape[1])
    for batch in block.batches:
        for rows in _weighted(batch, site):
            energy += rows.square().sum(0)
    block.ranks.add(energy)
    scores = (weight.square() * energy).view(len(weight), permutable.bins, -1, size)
    bins = scores.permute(1, 2, 0, 3).reshape(permutable.bins, -1, size)
    found = [best_order(own, pattern) + size * index for index, own in enumerate(bins)]
    return torch.cat(found)


def _weighted(batch: Batch, site: Site) -> Iterator[Tensor]:
    """The dense inputs of a site, divided by the sizes of their tokens if its errors are."""
    assert batch.dense is not None
    parts, scale = batch.dense.inputs[site.input], batch.dense.scale
    if not site.residual or scale is None or site.calls > 1:
        yield from (rows.float() for rows in parts)
        return
    sizes = torch.split(scale, [len(rows) for rows in parts])
    for rows, size in zip(parts, sizes, strict=True):
        yield rows.float() / size
