"""The inputs of weights, observed without the adapter, below hooks and torch functions.

Every matrix product calls one of a few operators. There a weight is recognised by its storage,
however the product is written. The strides of the factor give the orientation of the stored weight.
"""

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

K = TypeVar("K", bound=Hashable)

_aten = torch.ops.aten
# The operators, with the positions of their two factors.
PRODUCTS: dict[Any, tuple[int, int]] = {
    _aten.mm.default: (0, 1),
    _aten.bmm.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.baddbmm.default: (1, 2),
}
_SUMS = (_aten.add.Tensor, _aten.add_.Tensor)
_SELECTIONS = (_aten.topk.default, _aten.sort.default, _aten.max.dim, _aten.argmax.default)
_COPIES = (_aten.clone.default, _aten._to_copy.default)


@dataclass
class Seen:
    """The products with one weight.

    Attributes:
        inputs: the other factors (tokens, in), in fp64.
        stored: for each product, True if the weight is stored (in, out), False for (out, in),
            None if its shape does not determine it.
        first: the position of the first product among all products.
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
    """While entered, collects the inputs of the ``weights`` (2-D, by key).

    If all experts of a stack are multiplied at once, a ``routed`` weight gets a row of zeros for
    each token of another expert; these rows are left out.
    """

    def __init__(self, weights: Mapping[K, Tensor], routed: Collection[K] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._routed = set(routed)
        self.seen: dict[K, Seen] = {}
        self._weights = {storage_of(weight): (key, weight) for key, weight in weights.items()}
        self._products = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Record the factors of a product, then run the operator."""
        if func in PRODUCTS:
            left, right = (args[position] for position in PRODUCTS[func])
            self._products += 1
            self._record(right, left, lambda x: x)
            self._record(left, right, lambda x: x.transpose(-1, -2))
        return func(*args, **(kwargs or {}))

    def _record(self, factor: Tensor, other: Tensor, rows: Callable[[Tensor], Tensor]) -> None:
        """Record a product if ``factor`` is a watched weight; ``rows`` gives the form ``X Wᵀ``."""
        if storage_of(factor) not in self._weights:
            return
        for weight, inputs in slices_of(rows(factor), rows(other)):
            key, watched = self._weights.get(storage_of(weight), (None, None))
            if key is None or watched is None or weight.numel() != watched.numel():
                continue
            seen = self.seen.setdefault(key, Seen(first=self._products))
            skipped = key in self._routed and is_stack(factor)
            seen.inputs.append(used_rows(inputs, skipped).double())
            if min(weight.shape) > 1:
                seen.stored.append(weight.stride(-1) == 1)  # (in, out), and contiguous along out
            else:
                seen.stored.append(None)


def slices_of(factor: Tensor, inputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The weights (in, out) in one factor of a product, with their inputs (…, in).

    A factor of three dimensions is one matrix, expanded over the samples, or a stack of experts.
    """
    if factor.ndim == 2:
        yield factor, inputs
    elif is_stack(factor):
        yield from zip(factor, inputs, strict=True)
    else:
        yield factor[0], inputs


def is_stack(factor: Tensor) -> bool:
    """True for several matrices in one factor, False for one that is expanded over samples."""
    return factor.ndim == 3 and len(factor) > 1 and factor.stride(0) != 0


def used_rows(inputs: Tensor, stacked: bool) -> Tensor:
    """The rows (tokens, in) of a weight's inputs; for a stack, only the rows that are not zero.

    In a stack, a token is multiplied by zero for all experts that the router has not chosen.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    return rows[rows.any(-1)] if stacked else rows


class Stream(TorchDispatchMode, Generic[K]):  # type: ignore[no-untyped-call]
    """While entered, follows the residual stream; ``added`` are the weights of its summands."""

    def __init__(self, weights: Mapping[K, Tensor], stream: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.added: set[K] = set()
        self._weights = {storage_of(weight): key for key, weight in weights.items()}
        self._stream = {_address(stream)}
        self._products: dict[int, set[K]] = {}
        self._alive: list[Tensor] = [stream]  # so that no address is used again

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, and record if its result is a product or the stream."""
        result = func(*args, **(kwargs or {}))
        self._alive += [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        if not isinstance(result, Tensor):
            return result  # that of a norm is a tuple
        tensors = [x for x in args if isinstance(x, Tensor)]
        if func in PRODUCTS:
            factors = (args[position] for position in PRODUCTS[func])
            keys = {self._weights[s] for s in map(storage_of, factors) if s in self._weights}
            self._products[_address(result)] = keys
        elif func in _SUMS and len(tensors) == 2 and not kwargs:
            self._sum(result, *tensors)
        elif func in _COPIES:
            self._copy(result, tensors[0])
        return result

    def _sum(self, result: Tensor, left: Tensor, right: Tensor) -> None:
        products = self._products_in(left) | self._products_in(right)
        if {_address(left), _address(right)} & self._stream:
            self.added |= products
            self._stream.add(_address(result))
        elif products:  # a bias, or another product
            self._products[_address(result)] = products

    def _copy(self, result: Tensor, source: Tensor) -> None:
        self._products[_address(result)] = self._products_in(source)
        if _address(source) in self._stream:
            self._stream.add(_address(result))

    def _products_in(self, tensor: Tensor) -> set[K]:
        return self._products.get(_address(tensor), set())


class Selection(TorchDispatchMode, Generic[K]):  # type: ignore[no-untyped-call]
    """While entered, finds ``routers``, the weights whose products decide a selection (top-k).

    Between the product and the selection there is no other product.
    """

    def __init__(self, weights: Mapping[K, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.routers: set[K] = set()
        self._weights = {storage_of(weight): key for key, weight in weights.items()}
        self._products: dict[int, set[K]] = {}
        self._alive: list[Tensor] = []  # so that no address is used again

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, and record which products its results depend on."""
        results = func(*args, **(kwargs or {}))
        tensors = [x for x in args if isinstance(x, Tensor)]
        if func in PRODUCTS:
            keys = {self._weights[s] for s in map(storage_of, tensors) if s in self._weights}
        else:
            keys = set().union(*(self._products.get(_address(x), set()) for x in tensors))
        if func in _SELECTIONS:
            self.routers |= keys
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if keys and isinstance(result, Tensor):
                self._alive.append(result)
                self._products.setdefault(_address(result), set()).update(keys)
        return results


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def storage_of(tensor: Tensor) -> tuple[int, int]:
    """The address and offset of a tensor's values, which are the same for all of its views."""
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset())
