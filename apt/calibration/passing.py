"""One batch on its way through a block, product by product."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from apt.adapter import Site
from apt.calibration.batches import Batch
from apt.errors import AptError
from apt.solver.precision import full_precision


class Passing:
    """One batch on its way through a block, product by product.

    Attributes:
        tokens: the batch's tokens.
        dense: the activations of the dense model.
        drift: how far the residual stream (tokens, hidden) has drifted by now.
        seen: the tokens that each site's weight has been multiplied by, and in how many ``parts``.
    """

    def __init__(self, batch: Batch) -> None:
        self.tokens, self.dense = batch.tokens, batch.dense
        drift = batch.dense.drift if batch.dense is not None else None
        self.drift = drift.clone() if drift is not None else None
        self.seen: dict[Site, int] = defaultdict(int)
        self.parts: dict[Site, int] = defaultdict(int)
        self._owners: dict[str, Site] = {}
        self._anticipated: set[Site] = set()
        self._current: dict[str, list[Tensor]] = defaultdict(list)

    def owns(self, site: Site) -> bool:
        """Whether it is the first site that its input is given to."""
        return self._owners.setdefault(site.input, site) == site

    def keep(self, site: Site, rows: Tensor) -> None:
        """Keep what the first site of an input is given, to hold the others' against."""
        self._current[site.input].append(rows)

    def kept(self, site: Site, rows: Tensor) -> bool:
        """Whether the first site of the input was given the same."""
        parts, index = self._current[site.input], self.parts[site]
        return index < len(parts) and _same(parts[index], rows)

    def release(self, sites: Sequence[Site]) -> None:
        """Let go of the inputs that all of ``sites`` that share them have been given."""
        for name in [name for name in self._current if name in {site.input for site in sites}]:
            if all(self.done(site) for site in sites if site.input == name):
                del self._current[name]

    def here(self, site: Site, rows: Tensor) -> slice:
        """Which of the batch's tokens ``rows`` are."""
        start = self.seen[site] % self.tokens
        return slice(start, start + len(rows))

    def count(self, site: Site, rows: Tensor) -> None:
        """Count a product."""
        self.seen[site] += len(rows)
        self.parts[site] += 1

    def done(self, site: Site) -> bool:
        """Whether it has seen all of a batch; of a routed site that is not known before the end."""
        return not site.routed and self.seen[site] == site.calls * self.tokens

    def dense_input(self, site: Site, rows: Tensor) -> Tensor:
        """What the site's weight is multiplied by in the dense stream where it is by ``rows``."""
        assert self.dense is not None
        parts, index = self.dense.inputs[site.input], self.parts[site]
        if index >= len(parts) or parts[index].shape != rows.shape:
            raise AptError(
                f"{site.name} is multiplied by other tokens in the pruned stream than in the dense "
                "one: they cannot be held against each other",
                "prune layer-wise, or let the adapter declare it routed",
                ("error_aware",),
            )
        return parts[index]

    def anticipate(self, site: Site, here: slice, lost: Tensor) -> None:
        """Add to the drift what the product of a site would differ by with its weight dense.

        Args:
            site: a site that writes to the residual stream, and that is to be followed.
            here: the tokens.
            lost: ``(X_dense − X) Wᵀ`` (tokens, out).
        """
        assert self.drift is not None
        self.drift[here] += lost
        self._anticipated.add(site)

    @full_precision()
    def follow(self, site: Site, rows: Tensor, weight: Tensor, dense: Tensor) -> None:
        """Add to the drift what the site's product differs by between the two streams.

        Args:
            site: a site that writes to the residual stream.
            rows: its input (tokens, in).
            weight, dense: its weight (out, in), pruned and dense.
        """
        assert self.drift is not None
        here = self.drift[self.here(site, rows)]
        if site in self._anticipated:
            here += (rows @ (dense - weight).T).float()
        else:
            here += (self.dense_input(site, rows) @ dense.T).float()
            here -= (rows @ weight.T).float()


def _same(left: Tensor, right: Tensor) -> bool:
    if left.data_ptr() == right.data_ptr() and left.shape == right.shape:
        return True
    return left.shape == right.shape and torch.equal(left, right)
