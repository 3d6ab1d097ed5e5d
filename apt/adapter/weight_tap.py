"""The weight tap: it observes the inputs of a weight in every form of matrix product.

A forward hook runs only if a Linear is called as a module. Mamba multiplies by the weight of
``dt_proj`` directly, and fused kernels use other weights directly; a hook sees no input in these
cases. The tap observes the product itself.
"""

from collections.abc import Callable, Collection, Mapping
from types import FunctionType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

K = TypeVar("K")

# The positions of the two factors of a product among a function's arguments.
_FACTORS: dict[Any, tuple[int, int]] = {
    torch.nn.functional.linear: (0, 1),
    torch.matmul: (0, 1),
    torch.mm: (0, 1),
    torch.addmm: (1, 2),
    torch.bmm: (0, 1),
    torch.baddbmm: (1, 2),
    Tensor.matmul: (0, 1),
    Tensor.__matmul__: (0, 1),
    Tensor.__rmatmul__: (1, 0),
    Tensor.mm: (0, 1),
    Tensor.bmm: (0, 1),
    Tensor.baddbmm: (1, 2),
    Tensor.addmm: (1, 2),
}
# In the order of positions.
_KEYWORDS = ("input", "self", "mat1", "batch1", "weight", "mat2", "batch2", "other")


def _opened(func: Any) -> Any:
    """A copy of a function of torch, whose inner calls are passed to modes, but not itself.

    Torch passes a function that is written in Python to a mode as a whole, and calls it with the
    mode off. The copy does not ask for modes; what it calls does.
    """
    names = {**func.__globals__, "has_torch_function": lambda _: False}
    return FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)


COMPOSED: dict[Any, Any] = {
    func: _opened(func) for func in (torch.nn.functional.multi_head_attention_forward,)
}
"""Functions of torch that multiply by several weights, and their opened copies, see `_opened`."""


class WeightTap(TorchFunctionMode, Generic[K]):
    """Inside the context, pass the other factor of every product with a watched weight to ``sink``.

    A watched weight is recognised by its storage, so views and transposes of it are recognised too.
    The factor is passed as (..., in), from either side of the product. A product with a complete
    stack of weights (experts, …) counts as a product with each weight. The tap misses products with
    a copy of the weight (by autocast, parametrizations or ``torch.compile``). Callers must check
    that every weight was seen.

    Args:
        weights: the 2-D weights to watch, by key.
        sink: called with the key and the other factor, before the product is computed.
        routed: the keys of experts' weights. In a product with a complete stack, the tokens of
            other experts are rows of zeros, which are left out.
    """

    def __init__(
        self,
        weights: Mapping[K, Tensor],
        sink: Callable[[K, Tensor], None],
        routed: Collection[K] = (),
    ) -> None:
        super().__init__()
        self._routed = set(routed)
        self._sink = sink
        self._weights = {weight.data_ptr(): (key, weight) for key, weight in weights.items()}
        self._storages = {weight.untyped_storage().data_ptr() for weight in weights.values()}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Report the other factor if ``func`` is a product with a watched weight; then call it."""
        kwargs = kwargs or {}
        if func in COMPOSED:
            with self:  # its products come one by one
                return COMPOSED[func](*args, **kwargs)
        self._report(*factors_of(func, args, kwargs))
        return func(*args, **kwargs)

    def keys_of(self, func: Any, args: Any, kwargs: dict[str, Any]) -> set[K]:
        """The keys of the watched weights that ``func`` multiplies with these arguments."""
        if func not in _FACTORS:
            return set()
        factors: list[Any] = []
        for factor in factors_of(func, args, kwargs):
            factors += factor if self._is_stack(factor) else [factor]
        return {key for key in map(self._find, factors) if key is not None}

    def _report(self, left: Any, right: Any) -> None:
        if self._is_stack(right):
            for rows, weight in zip(left.expand(len(right), -1, -1), right, strict=True):
                key = self._find(weight)
                self._report(rows[rows.any(-1)] if key in self._routed else rows, weight)
        elif (key := self._find(right)) is not None:
            self._sink(key, left)
        elif (key := self._find(left)) is not None:
            self._sink(key, right.transpose(-1, -2))

    def _is_stack(self, factor: Any) -> bool:
        """True for a tensor (experts, …) of which a slice is a watched weight."""
        if not isinstance(factor, Tensor) or factor.ndim != 3 or factor.stride(0) == 0:
            return False
        watched = factor.untyped_storage().data_ptr() in self._storages
        return watched and any(self._find(weight) is not None for weight in factor)

    def _find(self, factor: Any) -> K | None:
        """The key of the weight that equals ``factor`` or its transpose; None if there is none."""
        if not isinstance(factor, Tensor) or factor.ndim != 2:
            return None
        key, weight = self._weights.get(factor.data_ptr(), (None, None))
        if weight is None or factor.numel() != weight.numel():
            return None
        same = (factor.shape, factor.stride()) == (weight.shape, weight.stride())
        flipped = (factor.shape, factor.stride()) == (weight.T.shape, weight.T.stride())
        return key if same or flipped else None


def factors_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The left and the right factor of a product; None for other functions and missing factors."""
    if func not in _FACTORS:
        return None, None
    left, right = _FACTORS[func]
    arguments = list(args)
    for name in _KEYWORDS:
        if name in kwargs and len(arguments) <= max(left, right):
            arguments.append(kwargs[name])
    return (
        (arguments[left], arguments[right]) if len(arguments) > max(left, right) else (None, None)
    )
