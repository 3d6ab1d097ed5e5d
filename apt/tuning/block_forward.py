"""The forward of a block as a function of its weights, for their gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from apt.adapter import Adapter, Call, State
from apt.calibration.batches import Batch, OpenBlock
from apt.solver.precision import multiplies_bf16


class _Step(nn.Module):
    def __init__(self, adapter: Adapter, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self._adapter = adapter

    def forward(self, state: State, call: Call) -> Tensor:
        return self._adapter.residual(self._adapter.step(self.block, state, call))


def stream_after(
    block: OpenBlock, weights: dict[str, Tensor], batch: Batch, state: State
) -> Tensor:
    """The residual stream (…, hidden) after ``block``, run with other weights by their names."""
    given = {f"block.{name}": weight for name, weight in weights.items()}
    step = _Step(block.adapter, block.module)
    with block.routed():
        stream: Any = functional_call(step, given, (state, batch.calls[block.index]))
    assert isinstance(stream, Tensor)
    return stream


def mixed_precision(weights: Sequence[Tensor]) -> torch.autocast:
    """Autocast to bf16, enabled if all weights are fp32 and the machine multiplies bf16 fast."""
    device = weights[0].device
    whole = all(weight.dtype == torch.float32 for weight in weights)
    return torch.autocast(device.type, torch.bfloat16, enabled=whole and multiplies_bf16(device))
