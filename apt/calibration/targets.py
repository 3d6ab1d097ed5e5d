"""Error-aware targets: targets of a pruned weight that include the error of earlier sites.

Layer-wise pruning keeps ``X Vᵀ`` close to ``X Wᵀ`` on the inputs ``X`` of the pruned model. The
dense model has other inputs, ``X_dense``, and the output ``X_dense Wᵀ``. If the output is added to
the residual stream, that stream has already drifted by ``Δ``. The target contains a share of both
errors (error feedback)::

    Y = X Wᵀ + α (X_dense − X) Wᵀ + β Δ

This changes only the right-hand side of the normal equations. The dense weight that approximates Y
best, damped towards W, is ``T = W + (α W (X_dense − X)ᵀX + β ΔᵀX) H⁻¹``. To prune for the target is
to prune ``T`` in place of ``W``, so every method can be used unchanged.

A share of a quarter is better than a half. A least-squares fit of the dense inputs from the pruned
ones shrinks every direction that the pruned inputs predict poorly, and this shrinkage accumulates
over the blocks.
"""

from dataclasses import dataclass

from torch import Tensor

from apt.adapter import Site
from apt.calibration.sums import Sums
from apt.solver import DampedGram
from apt.solver.precision import full_precision


@dataclass(frozen=True)
class Targets:
    """The shares of the earlier error for which each weight compensates.

    Args:
        alpha: α, the share of the error of the weight's own inputs.
        beta: β, the share of the drift of the residual stream, for weights that write to it.
    """

    alpha: float = 0.25
    beta: float = 0.25

    def error(self, lost: Tensor | None, drift: Tensor | None) -> Tensor:
        """The error for which a site compensates (tokens, out).

        Args:
            lost: ``(X_dense − X) Wᵀ`` (tokens, out); None if `Sums.cross` covers it.
            drift: ``Δ`` (tokens, out); None if the site does not write to the residual stream.
        """
        if lost is None:
            assert drift is not None
            return drift * self.beta
        lost = lost * self.alpha
        return lost if drift is None else lost.add_(drift, alpha=self.beta)

    @full_precision()
    def weight(self, dense: Tensor, site: Site, sums: Sums, damped: DampedGram) -> Tensor:
        """``T`` (out, in), to be pruned in place of the dense weight ``W`` (out, in)."""
        product = sums.error_products.get(site)
        if sums.cross is not None:
            lost = dense @ sums.cross * self.alpha
            product = lost if product is None else lost.add_(product)
        if product is None or not bool(product.any()):
            return dense
        return dense + damped.solve(product.to(damped.matrix.dtype) / sums.gram.tokens).to(dense)
