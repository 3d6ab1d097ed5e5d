"""Comparing and finding tensors."""

from typing import Any

from torch import Tensor


def near(found: Tensor, expected: Tensor, share: float = 1e-4) -> bool:
    """Whether two tensors agree to within ``share`` of the norm."""
    distance = (found.double() - expected.double()).norm()
    return bool(distance <= share * expected.double().norm().clamp(min=1e-12))


def first_tensor(value: Any) -> Tensor:
    """The first tensor in a state, a tuple or a mapping."""
    while not isinstance(value, Tensor):
        value = next(iter(value.values() if isinstance(value, dict) else value))
    return value


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors have the same shape and values, be their dtypes what they may."""
    return found.shape == expected.shape and bool((found == expected).all())
