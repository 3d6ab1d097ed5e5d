"""Error-aware targets: what a pruned weight should give, seeing the error of those before it.

Layer-wise, a weight is pruned so that ``X Vᵀ`` stays near ``X Wᵀ`` on the inputs ``X`` of the
pruned model. But the dense model, on its own inputs ``X_dense``, gives ``X_dense Wᵀ``, and where
the product is added to the residual stream, that stream has already drifted by ``Δ``. Asking for a
part of both::

    Y = X Wᵀ + α (X_dense − X) Wᵀ + β Δ

changes only the right-hand side of the normal equations. The dense weight that gives Y best,
damped towards W, is ``T = W + (α W (X_dense − X)ᵀX + β ΔᵀX) H⁻¹``, and pruning for the target is
pruning ``T`` in place of ``W``: every method serves, and none needs to know.

A quarter of both is better than half: a least-squares fit of the dense inputs from the pruned ones
shrinks whatever the pruned ones tell little about, and does so block after block.
"""

from dataclasses import dataclass

from torch import Tensor

from apt.adapter import Site
from apt.calibration.sums import Sums
from apt.solver import DampedGram
from apt.solver.precision import full_precision


@dataclass(frozen=True)
class Targets:
    """How much of the error so far each weight makes up for.

    Args:
        alpha: α, the share of the error of the weight's own inputs.
        beta: β, the share of the drift of the residual stream, for weights that write to it.
    """

    alpha: float = 0.25
    beta: float = 0.25

    def error(self, lost: Tensor | None, drift: Tensor | None) -> Tensor:
        """What a site is to make up for (tokens, out).

        Args:
            lost: ``(X_dense − X) Wᵀ`` (tokens, out), where that is not summed otherwise.
            drift: ``Δ`` (tokens, out), where its product is added to the stream.
        """
        if lost is None:
            assert drift is not None
            return drift * self.beta
        lost = lost * self.alpha
        return lost if drift is None else lost.add_(drift, alpha=self.beta)

    @full_precision()
    def weight(self, dense: Tensor, site: Site, sums: Sums, damped: DampedGram) -> Tensor:
        """``T`` (out, in), to be pruned in place of the dense weight ``W`` (out, in)."""
        pull = sums.pull.get(site)
        if sums.cross is not None:
            lost = dense @ sums.cross * self.alpha
            pull = lost if pull is None else lost.add_(pull)
        if pull is None or not (self.alpha or self.beta):
            return dense
        return dense + damped.solve(pull.to(damped.matrix.dtype) / sums.gram.tokens).to(dense)
