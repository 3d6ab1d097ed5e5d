"""The forward of a block as a function of its weights, for their gradients."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from apt.adapter import Adapter, Call, State
from apt.calibration.batches import OpenBlock


class _Step(nn.Module):
    """A module whose forward is a step of a block, for `functional_call`."""

    def __init__(self, adapter: Adapter, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self._adapter = adapter

    def forward(self, state: State, call: Call) -> Tensor:
        return self._adapter.residual(self._adapter.step(self.block, state, call))


class _Slices(TorchFunctionMode):
    """Inside the context, all slices of a stack of experts share one gradient.

    The gradient of ``stack[expert]`` has the size of the whole stack. So without sharing, the time
    of a backward pass would grow with the square of the number of experts.
    """

    def __init__(self, stacks: Iterable[Tensor]) -> None:
        super().__init__()
        self._slices = {id(stack): stack.unbind() for stack in stacks}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return the slice of a stack for an index of one expert; else call ``func``."""
        if func is Tensor.__getitem__ and id(args[0]) in self._slices and _is_one(args[1]):
            return self._slices[id(args[0])][int(args[1])]
        return func(*args, **(kwargs or {}))


def _is_one(index: Any) -> bool:
    """True for the index of a single entry: an integer, or an integer tensor without dimensions."""
    if isinstance(index, Tensor):
        return index.ndim == 0 and not index.is_floating_point() and index.dtype != torch.bool
    return isinstance(index, int) and not isinstance(index, bool)


def stream_after(block: OpenBlock, weights: dict[str, Tensor], state: State, call: Call) -> Tensor:
    """The residual stream (…, hidden) after ``block``, run with other weights by their names."""
    parameters = {f"block.{name}": weight for name, weight in weights.items()}
    step = _Step(block.adapter, block.module)
    with block.routed(), _Slices(weight for weight in weights.values() if weight.ndim == 3):
        stream: Any = functional_call(step, parameters, (state, call))
    assert isinstance(stream, Tensor)
    return stream
