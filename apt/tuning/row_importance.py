"""The importance of each output of a site to its block, for masks counted over the whole layer.

The layer-wise error weights all outputs equally. But a neuron with small weights in ``down_proj``
can lose a larger share of its weights than others. An error in weight ``w_ij`` changes the residual
stream after the block, to first order, by ``J_ij = ∂h / ∂w_ij``. With random signs ``u``,
``E[(uᵀJ_ij)²] = ‖J_ij‖²``, so one gradient of the weights estimates all of them (Hutchinson). The
importance of row i is the sum over its weights, with each input divided by its norm, and each token
by its norm on the stream::

    d_i = Σ_j ‖J_ij‖² / ‖x_j‖²

The mask is chosen for ``diag(d^(p/2)) W`` in place of ``W``, so by the weighted errors. The optimal
weights for a mask do not change, since rows depend on each other only through the count. Only a
pattern that is counted over the whole layer benefits. A small p is robust: the importance of a row
on the calibration text differs from its importance on other text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apt.adapter import Site, State
from apt.calibration.batches import Batch, OpenBlock, dense_call
from apt.calibration.dense_activations import bounded
from apt.options import ROW_IMPORTANCE
from apt.patterns import SitePattern
from apt.tuning.block_forward import stream_after

_LEAST = 0.01  # least importance, as a share of the mean: a small one would prune whole rows
_LEAST_SQUARE = 1e-4  # least sum of squares of an input, as a share of the mean


@dataclass(frozen=True)
class RowImportance:
    """The options of row importance.

    Args:
        power: p, the exponent of the importance as a factor of the squared error.
        tokens: the approximate number of tokens for the gradients, from the first batches.
    """

    power: float = ROW_IMPORTANCE
    tokens: int = 4096

    def serves(self, site: Site, pattern: SitePattern | None) -> bool:
        """True if the mask of ``site`` depends on the weighting of rows under ``pattern``."""
        return pattern is not None and not pattern.by_row and not site.routed

    def scales(
        self, block: OpenBlock, starts: Sequence[State], sites: Sequence[Site]
    ) -> dict[Site, Tensor]:
        """The factors of the rows of each site's weight, (out, 1).

        Args:
            block: the block, with its dense weights; its index seeds the random signs. The batches
                have the dense inputs of its sites.
            starts: the state of the dense stream before the block, for each batch.
        """
        ranks, batches = block.ranks, block.batches
        sizes = {site.input: _squares(batches, site.input) for site in sites}
        ranks.add(*sizes.values())
        names = dict.fromkeys(site.parameter for site in sites)
        weights = {n: block.module.get_parameter(n).detach().requires_grad_() for n in names}
        draw = torch.Generator().manual_seed(block.index * ranks.size + ranks.rank)
        rows = {site: torch.zeros((), device=sizes[site.input].device) for site in sites}
        for batch, start in zip(batches, starts, strict=True):
            with torch.enable_grad(), block.autocast:
                call = dense_call(batch, block.index)
                stream = stream_after(block, weights, start, call).float()
                signs = torch.randint(0, 2, stream.shape, generator=draw).to(stream) * 2 - 1
                relative = signs / bounded(stream.detach().square().sum(-1, keepdim=True)).sqrt()
                each = torch.autograd.grad((stream * relative).sum(), list(weights.values()))
            gradients = dict(zip(names, each, strict=True))
            for site in sites:
                squares = site.oriented(gradients[site.parameter]).float().square()
                rows[site] = rows[site] + (squares / sizes[site.input]).sum(1, keepdim=True)
            block.progress()
        ranks.add(*rows.values())
        return {site: self._scale(row) for site, row in rows.items()}

    def _scale(self, rows: Tensor) -> Tensor:
        mean = float(rows.mean())
        if not mean:
            return torch.ones_like(rows)
        return (rows / mean).clamp_min(_LEAST).pow(self.power / 2)


def _squares(batches: Sequence[Batch], name: str) -> Tensor:
    """``‖x_j‖²`` (in,) over the dense inputs ``name``, bounded below since it is a divisor."""
    parts = [x for batch in batches if batch.dense for x in batch.dense.inputs[name]]
    total = torch.stack([part.float().square().sum(0) for part in parts]).sum(0)
    least = max(_LEAST_SQUARE * float(total.mean()), torch.finfo(total.dtype).tiny)
    return total.clamp_min(least)
