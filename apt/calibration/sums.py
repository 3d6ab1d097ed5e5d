"""Sums over calibration tokens: the Gram matrix of an input, and sums for error-aware targets."""

from dataclasses import dataclass, field

from torch import Tensor

from apt.adapter import Site
from apt.distributed.ranks import Ranks
from apt.solver import Gram


@dataclass
class Sums:
    """Sums over the tokens of one input ``X`` (tokens, in) of the pruned stream.

    Attributes:
        gram: ``XᵀX``.
        cross: ``(X_dense − X)ᵀ X`` (in, in). It is None without a dense stream, and if the errors
            by the inputs are cheaper to sum in ``error_products``.
        error_products: ``Eᵀ X`` (out, in) by site, with ``E`` (tokens, out) the error for which the
            site compensates and which ``cross`` does not cover; see
            `apt.calibration.targets.Targets.error`.

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
