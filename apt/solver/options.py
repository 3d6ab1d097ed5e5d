"""What solvers are told, and what they answer."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Effort = Literal["fast", "default", "best"]
EFFORTS: tuple[Effort, ...] = ("fast", "default", "best")


@dataclass(frozen=True)
class SolverOptions:
    """What the methods can be told.

    Args:
        damping: λ as a share of the mean diagonal of the Gram matrix; None leaves it to what
            solves: `apt.solver.Gram.damped` takes 0.01.
        effort: how long a mask is searched for, by the methods that search.
        block_size: the columns B of one joint compensation; None takes all columns.
        mask_window: the columns over which the unstructured mask S is selected at a time.
        tolerance: where the joint solve for all columns stops, see `apt.solver.joint_weights`.
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
        damping: the damping used; None where the method uses none.
        residual: of a joint solve, what is left of its normal equations, see `apt.solver.Joint`.
    """

    weight: Tensor
    mask: Tensor
    damping: float | None = None
    residual: float | None = None
