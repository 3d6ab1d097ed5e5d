"""The products of a forward with the weights of a block, stored for the next forward."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from apt.adapter import Sink, Site
from apt.adapter.weight_tap import COMPOSED, WeightTap


class StoredProducts(TorchFunctionMode):
    """Computes a product with a weight once, for several runs of a block on the same state.

    The block is run once for each stage of sites. Before the first unsolved site, all runs multiply
    the same inputs by the same weights.

    Args:
        weights: the weights of the block as stored, by site.
    """

    def __init__(self, weights: Mapping[Site, Tensor]) -> None:
        super().__init__()
        self._tap = WeightTap[Site](weights, lambda site, rows: None)
        self._stored: list[tuple[set[Site], Tensor]] = []
        self._position = 0
        self._unsolved: set[Site] = set()
        self._stores = False
        self._aside = False

    @contextmanager
    def run(self, unsolved: Collection[Site]) -> Iterator[None]:
        """One run inside the context.

        Args:
            unsolved: the sites whose weights change before the last run. Their products and all
                later products are not stored.
        """
        self._position, self._unsolved = 0, set(unsolved)
        self._stores = bool(unsolved)
        with self:
            yield

    def aside(self, sink: Sink) -> Sink:
        """``sink``; its products with the weights do not count as products of the block."""

        def called_aside(site: Site, rows: Tensor) -> None:
            self._aside = True
            try:
                sink(site, rows)
            finally:
                self._aside = False

        return called_aside

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The stored product; if there is none, ``func`` is called."""
        kwargs = kwargs or {}
        if func in COMPOSED:
            with self:
                return COMPOSED[func](*args, **kwargs)
        sites = set[Site]() if self._aside else self._tap.keys_of(func, args, kwargs)
        if not sites and func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        self._position += 1
        if self._position <= len(self._stored):
            stored_sites, product = self._stored[self._position - 1]
            if stored_sites == sites:
                return product.clone()  # the block may write to it
            del self._stored[self._position - 1 :]
        product = func(*args, **kwargs)
        self._stores = self._stores and not sites & self._unsolved and "out" not in kwargs
        if self._stores:
            self._stored.append((sites, product.detach().clone()))
        return product
