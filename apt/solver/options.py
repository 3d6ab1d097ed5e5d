"""The options and the result of a solver."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

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
            `apt.solver.joint_weights`. `admm` takes a multiple of it after its first, short search,
            which is the only one with the effort ``"fast"``.
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
