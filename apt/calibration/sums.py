"""Sums over calibration tokens: the Gram matrix of an input, and what error-aware targets need."""

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
        cross: ``(X_dense − X)ᵀ X`` (in, in), where there is a dense stream and that is the cheaper
            way to what the sites have lost by their inputs.
        pull: ``Eᵀ X`` (out, in) by site, where ``E`` (tokens, out) is what it is to make up for
            beside that; see `apt.calibration.targets.Targets.error`.

    Beside a dense stream, the tokens of sites that write to the residual stream are weighted: the
    stream is normalised wherever it is read, so that an error counts relative to the token's own
    size. Unweighted, a few tokens with activations a hundred times larger would be all that counts.
    """

    gram: Gram
    cross: Tensor | None = None
    pull: dict[Site, Tensor] = field(default_factory=dict)

    def add_up(self, ranks: Ranks) -> None:
        """Add to them what the other ranks have summed."""
        if ranks.size == 1:
            return
        matrix = self.gram.matrix
        ranks.add(matrix, *([] if self.cross is None else [self.cross]), *self.pull.values())
        self.gram = Gram.from_sum(matrix, round(ranks.sum(self.gram.tokens)))
