"""Comparison and search of tensors."""

from typing import Any

from torch import Tensor


def near(tensor: Tensor, expected: Tensor, share: float = 1e-4) -> bool:
    """True if the distance of two tensors is at most ``share`` of the norm."""
    distance = (tensor.double() - expected.double()).norm()
    return bool(distance <= share * expected.double().norm().clamp(min=1e-12))


def first_tensor(value: Any) -> Tensor:
    """The first tensor in a state, a tuple or a mapping; raises `TypeError` if it has no tensor."""
    item = value
    while not isinstance(item, Tensor):
        try:
            item = next(iter(item.values() if isinstance(item, dict) else item))
        except (TypeError, StopIteration):
            raise TypeError(f"no tensor in a state that is {value!r}") from None
    return item


def same(tensor: Tensor, expected: Tensor) -> bool:
    """True if two tensors have the same shape and values, whatever their dtypes."""
    return tensor.shape == expected.shape and bool((tensor == expected).all())
