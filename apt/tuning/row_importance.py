"""How much each output of a site matters to the block, for masks that are shared out over rows.

The layer-wise error counts every output alike. But a neuron that ``down_proj`` hardly reads may
lose weights for which another has better use. What an error in weight ``w_ij`` does to the residual
stream after the block is, to first order, ``J_ij = ∂h / ∂w_ij``; with signs ``u`` drawn at random,
``E[(uᵀJ_ij)²] = ‖J_ij‖²``, so that one gradient of the weights estimates all of them (Hutchinson).
Summed over a row, each input relative to its own size, and each token to its size on the stream::

    d_i = Σ_j ‖J_ij‖² / ‖x_j‖²

Pruning ``diag(d^(p/2)) W`` in place of ``W`` chooses the mask by the errors so weighted, and leaves
the best weights for that mask as they are, since rows depend on each other by the count alone. Only
a pattern that is counted over the whole layer gains by it. A small p is robust: how much a row
matters on the calibration text is another thing on text of another kind.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Site, State
from apt.calibration.batches import Batch
from apt.distributed.ranks import Ranks
from apt.solver import Pattern, Unstructured
from apt.tuning.block_forward import mixed_precision, stream_after

_LEAST = 0.01  # of the mean: no row is given up for others
_TINY = 1e-4


@dataclass(frozen=True)
class RowImportance:
    """How rows are weighted.

    Args:
        power: p, of the squared error.
        tokens: about as many give the gradients, of the first batches.
    """

    power: float = 0.35
    tokens: int = 4096

    def serves(self, site: Site, pattern: Pattern | None) -> bool:
        """Whether a mask of that pattern depends on how rows are weighted."""
        shared_out = isinstance(pattern, Unstructured) and pattern.per != "row"
        return shared_out and not site.routed

    def scales(
        self,
        adapter: Adapter,
        block: nn.Module,
        index: int,
        batches: Sequence[Batch],
        starts: Sequence[State],
        sites: Sequence[Site],
        ranks: Ranks,
        progress: Callable[[], None] = lambda: None,
    ) -> dict[Site, Tensor]:
        """What to multiply the rows of each site's weight by, (out, 1).

        Args:
            adapter: the block's adapter.
            block: the block, its weights still dense.
            index: its place among the blocks, from which the signs are drawn.
            batches: those to take, with the dense inputs of the block's sites.
            starts: the state of the dense stream before the block, of each.
            sites: the sites.
            ranks: the processes that have other batches.
            tell: called after each batch.
        """
        sizes = {site.input: _squares(batches, site.input) for site in sites}
        ranks.add(*sizes.values())
        names = dict.fromkeys(site.parameter for site in sites)
        weights = {name: block.get_parameter(name).detach().requires_grad_() for name in names}
        draw = torch.Generator().manual_seed(index * ranks.size + ranks.rank)
        rows = {site: torch.zeros((), device=sizes[site.input].device) for site in sites}
        for batch, start in zip(batches, starts, strict=True):
            with torch.enable_grad(), mixed_precision(list(weights.values())):
                stream = stream_after(adapter, block, weights, start, batch.calls[index]).float()
                signs = torch.randint(0, 2, stream.shape, generator=draw).to(stream) * 2 - 1
                relative = signs / stream.detach().norm(dim=-1, keepdim=True)
                found = torch.autograd.grad((stream * relative).sum(), list(weights.values()))
            gradients = dict(zip(names, found, strict=True))
            for site in sites:
                squares = site.oriented(gradients[site.parameter]).float().square()
                rows[site] = rows[site] + (squares / sizes[site.input]).sum(1, keepdim=True)
            progress()
        ranks.add(*rows.values())
        return {site: self._scale(row) for site, row in rows.items()}

    def _scale(self, rows: Tensor) -> Tensor:
        mean = float(rows.mean())
        if not mean:
            return torch.ones_like(rows)
        return (rows / mean).clamp_min(_LEAST).pow(self.power / 2)


def _squares(batches: Sequence[Batch], name: str) -> Tensor:
    """``‖x_j‖²`` (in,) over the dense inputs of that name, none so small that it stands out."""
    parts = [x for batch in batches if batch.dense for x in batch.dense.inputs[name]]
    total = torch.stack([part.float().square().sum(0) for part in parts]).sum(0)
    return total.clamp_min(max(_TINY * float(total.mean()), torch.finfo(total.dtype).tiny))
