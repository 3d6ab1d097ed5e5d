"""The events that a run reports to its observers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

Phase = Literal[
    "reading text", "opening the model", "measuring before", "generating text", "allocation",
    "structure", "pruning", "dense model", "training", "writing", "measuring after",
]  # fmt: skip
"""The phases of a run, by their names in reports. A run has some of them, one after the other."""


class Status(Protocol):
    """Called at the beginning of each phase, and of each step within a phase."""

    def __call__(self, phase: Phase, text: str = "") -> None:
        """Show a step of a run.

        Args:
            phase: the phase.
            text: what is shown; by default the name of the phase.
        """


@dataclass(frozen=True)
class BlockStarted:
    """The pruning of a block starts; ``index`` counts from 0, ``blocks`` is the total number."""

    name: str
    index: int
    blocks: int


@dataclass(frozen=True)
class SitePruned:
    """The record of one pruned site.

    Attributes:
        name: the full name of the site.
        kind: the name within the block, which is the same for all experts of a stack.
        shape: (out, in).
        pattern: the pattern of the site.
        zeros: the number of zeros in the pruned weight.
        relative_error: the relative layer error of the weight as written, in its own dtype.
        damping: the damping used; None if the method uses none.
        residual: the residual of a joint solve's normal equations, see `apt.solver.Joint`.
        tokens: the number of calibration tokens that the site received.
        seconds: the time of the solve.
        order: for each column of the pruned weight, its index in the dense weight, if the inputs
            have changed places; None if they have not.
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
    order: tuple[int, ...] | None = None

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
        """True if the site received fewer tokens than it has inputs, as an expert may."""
        return self.tokens < self.shape[1]


@dataclass(frozen=True)
class ExpertsRemoved:
    """Experts of a block were removed.

    Attributes:
        name: the block.
        experts: the indices of the removed experts.
        merged: pairs of a removed expert and the kept expert into which it was averaged.
        scores: the score of each expert, by which they were chosen; empty if there are none.
        underserved: the experts with fewer tokens than the least number.
        unprotected: the experts that a protected source of the calibration needs, and that had no
            place among the kept experts.
    """

    name: str
    experts: tuple[int, ...]
    merged: tuple[tuple[int, int], ...] = ()
    scores: tuple[float, ...] = ()
    underserved: tuple[int, ...] = ()
    unprotected: tuple[int, ...] = ()


@dataclass(frozen=True)
class ExpertsRouted:
    """What the experts of a block get from each source of the calibration text.

    Attributes:
        name: the block.
        tokens: the number of tokens of each expert, by source. A token counts for each expert that
            it is sent to.
        weights: the sum of the router's weights of these tokens for each expert, by source.
    """

    name: str
    tokens: Mapping[str, tuple[int, ...]]
    weights: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class BlockTuned:
    """The kept weights of a block were tuned.

    Attributes:
        name: the block.
        before, after: the error of its output on the samples held back, before and after tuning;
            see methods.md, "Block tuning".
    """

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class Working:
    """One unit of work within a block: one batch run, one site solved or one tuning step taken.

    An observer can stop the run by an exception. At most one unit of work is done between two of
    these events, so the run stops soon.

    Attributes:
        name: the block.
        doing: the kind of work.
    """

    name: str
    doing: Literal["running", "solving", "tuning"]


@dataclass(frozen=True)
class TrainingStep:
    """A step of a recovery's training.

    Attributes:
        step, steps: the number of the step, from 1, and the planned number of steps.
        loss: the loss of the batch.
        rate: the learning rate.
        seconds: the time since the training began.
    """

    step: int
    steps: int
    loss: float
    rate: float
    seconds: float


@dataclass(frozen=True)
class HeldBack:
    """The mean loss on the samples held back, after ``step`` steps, see `apt.Training`."""

    step: int
    loss: float


BlockRecord = SitePruned | ExpertsRemoved | ExpertsRouted
"""The records that a run keeps of a block."""

Event = BlockStarted | Working | BlockTuned | BlockRecord
Observer = Callable[[Event], None]


@dataclass(frozen=True)
class CheckpointSaved:
    """The state of a training after ``step`` steps is on disk."""

    step: int


TrainingEvent = TrainingStep | HeldBack | CheckpointSaved
TrainingObserver = Callable[[TrainingEvent], None]


def with_site_observer(observe: Observer, site_pruned: Callable[[SitePruned], None]) -> Observer:
    """An observer that calls ``observe``, and also ``site_pruned`` for every pruned site."""

    def observe_both(event: Event) -> None:
        observe(event)
        if isinstance(event, SitePruned):
            site_pruned(event)

    return observe_both
