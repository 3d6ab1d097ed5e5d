"""Comparing and finding tensors."""

from typing import Any

from torch import Tensor


def near(found: Tensor, expected: Tensor, share: float = 1e-4) -> bool:
    """Whether two tensors agree to within ``share`` of the norm."""
    distance = (found.double() - expected.double()).norm()
    return bool(distance <= share * expected.double().norm().clamp(min=1e-12))


def first_tensor(value: Any) -> Tensor:
    """The first tensor in a state, a tuple or a mapping.

    Raises:
        TypeError: there is none.
    """
    held = value
    while not isinstance(held, Tensor):
        try:
            held = next(iter(held.values() if isinstance(held, dict) else held))
        except (TypeError, StopIteration):
            raise TypeError(f"no tensor in a state that is {value!r}") from None
    return held


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors have the same shape and values, be their dtypes what they may."""
    return found.shape == expected.shape and bool((found == expected).all())
