"""The options and the result of a solver."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from apt.patterns import Pattern
from apt.solver.gram import SolverError

Effort = Literal["fast", "default", "best"]
EFFORTS: tuple[Effort, ...] = ("fast", "default", "best")


@dataclass(frozen=True)
class SolverOptions:
    """The options of the methods.

    Args:
        damping: λ as a share of the mean diagonal of the Gram matrix; None leaves the choice to
            the method, and `apt.solver.Gram.damped` takes 0.01.
        effort: the amount of search for a mask, for the methods that search.
        block_size: the columns B of one joint compensation; None takes all columns.
        mask_window: the number of columns over which an unstructured mask S is selected.
        tolerance: the tolerance at which the joint solve for all columns stops, see
            `apt.solver.joint_weights`. `admm` takes a multiple of it after its first search, which
            is short. With the effort ``"fast"`` there is no other search.
    """

    damping: float | None = None
    effort: Effort = "default"
    block_size: int | None = None
    mask_window: int = 128
    tolerance: float = 1e-3


@dataclass(frozen=True)
class Solution:
    """A solved layer.

    Attributes:
        weight: ``V`` (out, in), exactly zero where pruned.
        mask: True where pruned (out, in).
        damping: the damping used; None if the method uses none.
        residual: of a joint solve, the residual of its normal equations, see `apt.solver.Joint`.
    """

    weight: Tensor
    mask: Tensor
    damping: float | None = None
    residual: float | None = None


def check_fit(weight: Tensor, pattern: Pattern) -> None:
    """Raise `SolverError` if a weight (out, in) cannot have the pattern."""
    if misfit := pattern.misfit((weight.shape[0], weight.shape[1])):
        raise SolverError(f"the weight {misfit} (pattern {pattern})")


class MethodError(TypeError):
    """A method returned an unusable value. The text continues "method NAME …"."""


def check_solution(found: object, weight: Tensor) -> None:
    """Raise unless a method returned a solution for ``weight`` (out, in).

    Raises:
        MethodError: ``found`` is no `Solution`, or its tensors have another shape, dtype or device.
    """
    if not isinstance(found, Solution):
        raise MethodError(f"returns {type(found).__name__}, not an apt.solver.Solution")
    check_tensor(found.weight, "a weight", weight.shape, weight.dtype, weight.device)
    check_tensor(found.mask, "a mask", weight.shape, torch.bool, weight.device)


def check_tensor(
    value: object,
    name: str,
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> None:
    """Raise `MethodError` unless ``value`` is a tensor of this shape and dtype.

    Args:
        name: the name of the value in the message, with an article.
        device: the required device; None for any.
    """
    if not isinstance(value, Tensor):
        raise MethodError(f"returns {type(value).__name__} as {name}, not a tensor")
    for actual, expected in ((tuple(value.shape), tuple(shape)), (value.dtype, dtype)):
        if actual != expected:
            raise MethodError(f"returns {name} of {actual}, not {expected}")
    if device is not None and value.device != device:
        raise MethodError(f"returns {name} on {value.device}, not {device}")
