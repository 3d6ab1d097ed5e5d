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

from dataclasses import dataclass, field

from torch import Tensor

from apt.adapter import Site
from apt.distributed.ranks import Ranks
from apt.options import DRIFT_CORRECTION, INPUT_CORRECTION
from apt.solver import DampedGram, Gram
from apt.solver.precision import full_precision


@dataclass
class Sums:
    """Sums over the tokens of one input ``X`` (tokens, in) of the pruned stream.

    Attributes:
        gram: ``XᵀX``.
        cross: ``(X_dense − X)ᵀ X`` (in, in). It is None without a dense stream, or if the sums in
            ``error_products`` are cheaper.
        error_products: ``Eᵀ X`` (out, in) by site. ``E`` (tokens, out) is the error for which the
            site compensates, without the part in ``cross``; see `Targets.error`.

    With a dense stream, the tokens of sites that write to the residual stream are weighted. Every
    block normalises the stream, so an error counts relative to the size of its token. Without
    weights, a few tokens with activations a hundred times larger would dominate the sums.
    """

    gram: Gram
    cross: Tensor | None = None
    error_products: dict[Site, Tensor] = field(default_factory=dict)

    def add_up(self, ranks: Ranks) -> None:
        """Add the sums of the other ranks, in place."""
        if ranks.size == 1:
            return
        self.gram.add_up(ranks.add, round(ranks.sum(self.gram.tokens)))
        self.gram.sample = max(ranks.gather(self.gram.sample))  # 0 where an expert had no token
        cross = [] if self.cross is None else [self.cross]
        ranks.add(*cross, *self.error_products.values())


@dataclass(frozen=True)
class Targets:
    """The shares of the earlier error for which each weight compensates.

    Args:
        alpha: α, the share of the error of the weight's own inputs.
        beta: β, the share of the drift of the residual stream, for weights that write to it.
    """

    alpha: float = INPUT_CORRECTION
    beta: float = DRIFT_CORRECTION

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
            input_product = dense @ sums.cross * self.alpha
            product = input_product if product is None else input_product.add_(product)
        if product is None or not bool(product.any()):
            return dense
        return dense + damped.solve(product.to(damped.matrix.dtype) / sums.gram.tokens).to(dense)
