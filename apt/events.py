"""What is told of a run while it goes on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class BlockStarted:
    """A block's turn has come; ``index`` counts from 0."""

    name: str
    index: int
    blocks: int


@dataclass(frozen=True)
class SitePruned:
    """What was done to one site.

    Attributes:
        name: its full name.
        kind: its name within the block, which experts have in common.
        shape: (out, in).
        pattern: the pattern asked for.
        zeros: the zeros now in the weight.
        relative_error: the relative layer error of the weight as written, in its own dtype.
        damping: the damping used; None where the method uses none.
        residual: what a joint solve left of its normal equations, see `apt.solver.Joint`.
        tokens: the calibration tokens that it saw.
        seconds: the time of the solve.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    pattern: str
    zeros: int
    relative_error: float
    damping: float | None
    residual: float | None
    tokens: int
    seconds: float

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return self.zeros / self.size

    @property
    def starved(self) -> bool:
        """Whether it saw fewer tokens than it has inputs, as an expert may."""
        return self.tokens < self.shape[1]


@dataclass(frozen=True)
class BlockTuned:
    """A block's kept weights have been tuned.

    Attributes:
        name: the block.
        before, after: the error of its output on the samples held back, see
            `apt.tuning.reconstruct.Tuned`.
    """

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class Working:
    """Within a block, one more batch was run, one more site solved or one more tuning step taken.

    Between two of them no more happens than one of these, so that an observer that raises is soon
    heeded.

    Attributes:
        name: the block.
        doing: what there was one more of.
    """

    name: str
    doing: Literal["running", "solving", "tuning"]


Event = BlockStarted | Working | SitePruned | BlockTuned
Observer = Callable[[Event], None]


def telling(observe: Observer, tell: Callable[[SitePruned], None]) -> Observer:
    """``observe``, with ``tell`` called as well for every site that is pruned."""

    def both(event: Event) -> None:
        observe(event)
        if isinstance(event, SitePruned):
            tell(event)

    return both
