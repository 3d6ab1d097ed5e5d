"""The record of a training, and the rules that end one early."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Training:
    """The record of a training.

    Attributes:
        steps: the planned number of steps.
        tokens: the tokens of a step, over all processes; the mean number of positions for samples
            that are not windows of text.
        batch: the samples of a step, over all processes.
        products: the dtype in which the fp32 weights were multiplied: bf16 in mixed precision.
        held_back: the loss on the samples held back, by step: of the next token, or the divergence
            from the dense model.
        best: the step whose weights are the result. If no step lowered the loss on the samples held
            back, it is 0, and the result is the weights before the training.
        diverged: the step after which the loss diverged; None if it did not.
        stopped: the reason for an early end; empty if the training ended as planned.
        exchanges: the number of exchanged weights, if masks move.
    """

    steps: int
    tokens: int
    batch: int = 0
    products: str = "float32"
    losses: list[float] = field(default_factory=list)
    held_back: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    best: int = 0
    diverged: int | None = None
    stopped: str = ""
    exchanges: int = 0

    def checks_since_best(self, last_move: int = 0) -> int:
        """The number of measurements after the lowest loss; step 0 does not count.

        Args:
            last_move: the step after which the masks are fixed. While masks move, the loss may rise
                for a time, so that the measurements until then do not count.
        """
        losses = {step: loss for step, loss in self.held_back.items() if step}
        best = min(losses, key=lambda step: losses[step], default=0)
        return sum(step > max(best, last_move) for step in losses)

    def record(self) -> dict[str, Any]:
        """The record as values for JSON."""
        return {**vars(self), "held_back": [list(pair) for pair in self.held_back.items()]}


StopRule = Callable[[Training], str | None]
"""A function that returns the reason to end a training, or None, after each measured loss."""
