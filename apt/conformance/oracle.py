"""What a weight is multiplied by, found without the adapter: below hooks and torch functions.

Every product ends in one of a few operators. Seen there, a weight is known by its storage, whoever
wrote the product and however; and the strides of the factor tell in which direction it is stored.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

K = TypeVar("K", bound=Hashable)

_aten = torch.ops.aten
# The operators, and where their two factors stand.
PRODUCTS: dict[Any, tuple[int, int]] = {
    _aten.mm.default: (0, 1),
    _aten.bmm.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.baddbmm.default: (1, 2),
}
_SUMS = (_aten.add.Tensor, _aten.add_.Tensor)
_COPIES = (_aten.clone.default, _aten._to_copy.default)


@dataclass
class Seen:
    """The products with one weight.

    Attributes:
        inputs: the other factors (tokens, in), in fp64.
        stored: of each product, whether it says that the weight is stored (in, out); None where
            its shape leaves that open.
        first: the place of the first product among all.
    """

    inputs: list[Tensor] = field(default_factory=list)
    stored: list[bool | None] = field(default_factory=list)
    first: int = -1

    @property
    def gram(self) -> Tensor:
        """``XᵀX`` (in, in) in fp64."""
        rows = torch.cat(self.inputs)
        return rows.T @ rows

    @property
    def tokens(self) -> int:
        """The number of rows."""
        return sum(len(rows) for rows in self.inputs)


class Oracle(TorchDispatchMode, Generic[K]):  # type: ignore[no-untyped-call]
    """While entered, collects what the ``weights`` (2-D, by key) are multiplied by."""

    def __init__(self, weights: Mapping[K, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: dict[K, Seen] = {}
        self._weights = {place_of(weight): (key, weight) for key, weight in weights.items()}
        self._products = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at the factors of a product, then let it happen."""
        if func in PRODUCTS:
            left, right = (args[place] for place in PRODUCTS[func])
            self._products += 1
            self._look(right, left, lambda x: x)
            self._look(left, right, lambda x: x.transpose(-1, -2))
        return func(*args, **(kwargs or {}))

    def _look(self, factor: Tensor, other: Tensor, rows: Callable[[Tensor], Tensor]) -> None:
        """Whether ``factor`` is a watched weight; ``rows`` turns both factors to ``X Wᵀ``."""
        key, weight = self._weights.get(place_of(factor), (None, None))
        if factor.ndim == 3 and factor.stride(0) == 0:
            factor = factor[0]  # one matrix for all samples
        if key is None or weight is None or factor.numel() != weight.numel():
            return
        inputs, turned = rows(other), rows(factor)
        seen = self.seen.setdefault(key, Seen(first=self._products))
        seen.inputs.append(inputs.reshape(-1, inputs.shape[-1]).double())
        if min(turned.shape[-2:]) > 1:
            seen.stored.append(turned.stride(-1) == 1)  # (in, out), and contiguous along out
        else:
            seen.stored.append(None)


class Stream(TorchDispatchMode, Generic[K]):  # type: ignore[no-untyped-call]
    """While entered, follows a residual stream through the additions of a block.

    Attributes:
        added: the keys of the ``weights`` whose products were added to the stream as they are.
    """

    def __init__(self, weights: Mapping[K, Tensor], stream: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.added: set[K] = set()
        self._weights = {place_of(weight): key for key, weight in weights.items()}
        self._stream = {_storage(stream)}
        self._products: dict[int, set[K]] = {}
        self._alive: list[Tensor] = [stream]  # so that no storage's place is taken by another

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let it happen, and say what its result is: a product, the stream, or neither."""
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor):
            return result
        self._alive.append(result)
        tensors = [x for x in args if isinstance(x, Tensor)]
        if func in PRODUCTS:
            factors = (args[place] for place in PRODUCTS[func])
            keys = {self._weights[p] for p in map(place_of, factors) if p in self._weights}
            self._products[_storage(result)] = keys
        elif func in _SUMS and len(tensors) == 2 and not kwargs:
            self._sum(result, *tensors)
        elif func in _COPIES:
            self._same(result, tensors[0])
        return result

    def _sum(self, result: Tensor, left: Tensor, right: Tensor) -> None:
        products = self._of(left) | self._of(right)
        if {_storage(left), _storage(right)} & self._stream:
            self.added |= products
            self._stream.add(_storage(result))
        elif products:  # a bias, or another product
            self._products[_storage(result)] = products

    def _same(self, result: Tensor, source: Tensor) -> None:
        self._products[_storage(result)] = self._of(source)
        if _storage(source) in self._stream:
            self._stream.add(_storage(result))

    def _of(self, tensor: Tensor) -> set[K]:
        return self._products.get(_storage(tensor), set())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def place_of(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor's values lie: what tells weights apart, whoever views them."""
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset())
