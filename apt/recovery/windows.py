"""The training of blocks in turn, one window of neighbouring blocks at a time.

Only the blocks of the window have gradients and moments of the optimizer, as in BAdam (arXiv
2404.02827). The loss is the loss of the whole model: the backward pass ends at the window, and the
blocks before it run without gradients.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerState

from apt.adapter import Adapter


class BlockWindows(TrainerCallback):  # type: ignore[misc]
    """The windows of a training, in the order of the blocks.

    Args:
        model: the model, in which the parameters to be trained require gradients.
        size: the number of blocks of a window.
        steps: the number of steps of the training, which are divided equally among the windows.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, size: int, steps: int) -> None:
        blocks = ([p for p in b.parameters() if p.requires_grad] for _, b in adapter.blocks(model))
        trained = [parameters for parameters in blocks if parameters]
        self._steps = steps
        self._windows = [
            [p for parameters in trained[start : start + size] for p in parameters]
            for start in range(0, len(trained), size)
        ]

    def __len__(self) -> int:
        return len(self._windows)

    def on_step_begin(
        self, args: Any, state: TrainerState, control: Any, *, optimizer: Any, **_: Any
    ) -> None:
        """Train the window of this step, and delete the moments of all other windows."""
        for parameter in self._select(state.global_step * len(self) // self._steps):
            parameter.grad = None
            optimizer.state.pop(parameter, None)

    @contextmanager
    def middle(self) -> Iterator[None]:
        """Inside the context, the middle window is trained; its steps take about the mean time."""
        others = self._select(len(self) // 2)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def _select(self, current: int) -> list[nn.Parameter]:
        """Require gradients of one window only; returns the parameters of all other windows."""
        others = []
        for index, window in enumerate(self._windows):
            for parameter in window:
                parameter.requires_grad_(index == current)
            others += window if index != current else []
        return others
