"""The pass of one batch through a block, product by product."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from apt.adapter import Sink, Site
from apt.calibration.batches import Batch
from apt.calibration.stored_products import StoredProducts
from apt.errors import AptError
from apt.solver.precision import full_precision


class BlockPass:
    """The pass of one batch through a block, product by product, in one or several runs.

    Args:
        products: the products of earlier runs; None if they are computed again.

    Attributes:
        drift: the drift of the residual stream (tokens, hidden) up to the current product.
        seen: the number of tokens that each site has received in the current run.
        parts: the number of parts in which each site has received its tokens.
    """

    def __init__(self, batch: Batch, products: StoredProducts | None = None) -> None:
        self.dense, self._batch, self._products = batch.dense, batch, products
        drift = batch.dense.drift if batch.dense is not None else None
        self.drift = drift.clone() if drift is not None else None
        self._with_input_drift: set[Site] = set()
        self._drifted: dict[Site, int] = defaultdict(int)  # the parts whose drift is added
        self._restart()

    def _restart(self) -> None:
        self.seen: dict[Site, int] = defaultdict(int)
        self.parts: dict[Site, int] = defaultdict(int)
        self._owners: dict[str, Site] = {}
        self._current: dict[str, list[Tensor]] = defaultdict(list)
        self._summands: dict[str, list[Tensor]] = defaultdict(list)

    @contextmanager
    def run(self, unsolved: Collection[Site] = ()) -> Iterator[None]:
        """One run of the block inside the context; see `StoredProducts.run`."""
        with nullcontext() if self._products is None else self._products.run(unsolved):
            yield
        self._restart()

    def aside(self, sink: Sink) -> Sink:
        """``sink``, called beside the run; see `StoredProducts.aside`."""
        return sink if self._products is None else self._products.aside(sink)

    def sample_of(self, site: Site) -> int:
        """The number of tokens of each sample that a site multiplies."""
        samples = self._batch.tokens // (self._batch.sample or self._batch.tokens)
        return self._batch.tokens_of(site) // samples

    def is_first(self, site: Site) -> bool:
        """True if ``site`` is the first site that receives its input."""
        return self._owners.setdefault(site.input, site) == site

    def keep(self, site: Site, rows: Tensor) -> None:
        """Keep the input of the first site, for comparison with the inputs of the other sites."""
        self._current[site.input].append(rows)

    def equals_kept(self, site: Site, rows: Tensor) -> bool:
        """True if the first site of the input received the same ``rows``."""
        parts, index = self._current[site.input], self.parts[site]
        if index >= len(parts) or parts[index].shape != rows.shape:
            return False
        same = parts[index].data_ptr() == rows.data_ptr()
        return same or torch.equal(parts[index], rows)

    def keep_summand(self, site: Site, rows: Tensor) -> None:
        """Keep the input of a site, to which the block adds a later product."""
        self._summands[site.input].append(rows)

    def summand_drift(self, site: Site, tokens: slice) -> Tensor:
        """The drift (tokens, out) of the input to which the products of a site are added."""
        assert self.dense is not None
        dense = torch.cat(self.dense.inputs[site.added_to])[tokens]
        return dense.float() - torch.cat(self._summands[site.added_to])[tokens].float()

    def release(self, sharing: Sequence[Site]) -> None:
        """Drop the kept input of the sites ``sharing`` after all of them have received it."""
        if sharing and all(self.done(site) for site in sharing):
            self._current.pop(sharing[0].input, None)

    def token_slice(self, site: Site, rows: Tensor) -> slice:
        """The slice of the batch's tokens that ``rows`` belong to."""
        start = self.seen[site] % self._batch.tokens_of(site)
        return slice(start, start + len(rows))

    def count(self, site: Site, rows: Tensor) -> None:
        """Count a product of ``site`` with ``rows``."""
        self.seen[site] += len(rows)
        self.parts[site] += 1

    def done(self, site: Site) -> bool:
        """True if ``site`` has received the whole batch; False for a routed site."""
        return not site.routed and self.seen[site] == site.calls * self._batch.tokens_of(site)

    def dense_input(self, site: Site, rows: Tensor) -> Tensor:
        """The input of the site in the dense stream that corresponds to ``rows``."""
        assert self.dense is not None
        parts, index = self.dense.inputs[site.input], self.parts[site]
        if index >= len(parts) or parts[index].shape != rows.shape:
            raise AptError(
                f"{site.name} is multiplied by other tokens in the pruned stream than in the dense "
                "stream, so the two cannot be compared",
                "prune layer-wise, or let the adapter declare it routed",
                ("error_aware",),
            )
        return parts[index]

    def add_input_drift(self, site: Site, tokens: slice, lost: Tensor) -> None:
        """Add to the drift the error by the inputs of a site, before the site is pruned.

        `add_drift` must follow for the same site; it then adds the error by pruning alone.

        Args:
            lost: ``(X_dense − X) Wᵀ`` (tokens, out).
        """
        assert self.drift is not None
        self.drift[tokens] += lost
        self._with_input_drift.add(site)

    @full_precision()
    def add_drift(self, site: Site, rows: Tensor, weight: Tensor, dense: Tensor) -> None:
        """Add to the drift the difference of the site's product between the two streams.

        Parts that are already added are left out: the part of `add_input_drift`, and products whose
        difference an earlier run has added.

        Args:
            rows: the input (tokens, in) of the site.
            weight, dense: the pruned and the dense weight (out, in) of the site.
        """
        assert self.drift is not None
        if self.parts[site] < self._drifted[site]:
            return
        self._drifted[site] += 1
        drift, inputs = self.drift[self.token_slice(site, rows)], rows.to(weight.dtype)
        if site in self._with_input_drift:
            drift += (inputs @ (dense - weight).T).float()
        else:
            drift += (self.dense_input(site, rows).to(dense.dtype) @ dense.T).float()
            drift -= (inputs @ weight.T).float()
