"""A selective scan with a hand-written gradient, to train Mamba on a CPU.

The pure-PyTorch scan of transformers slices tensors over the whole sequence at every time step;
the gradient of each slice is a tensor as large as the whole, so a backward pass costs time
quadratic in the length of the sequence. Here the state of one time step stays in the processor's
cache, and the gradient is accumulated by a second loop that runs backwards in time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.models.mamba import modeling_mamba

# Shapes: B is the batch, L the length, D the inner width and N the size of the state. The inner
# width comes last: every operation of the loops then runs over contiguous rows of it.


class _Scan(torch.autograd.Function):
    """``h[t] = exp(a step[t]) h[t-1] + b[t] drive[t]`` and ``y[t] = c[t] h[t]``, time first."""

    @staticmethod
    def forward(ctx: Any, step: Tensor, drive: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """Return y (L, B, D) from step and drive (L, B, D), a (N, D), b and c (L, B, N)."""
        length, batch, width = step.shape
        states = step.new_empty(length, batch, a.shape[0], width)
        state, decay = torch.zeros_like(states[0]), torch.empty_like(states[0])
        for t in range(length):
            torch.mul(a, step[t].unsqueeze(1), out=decay).exp_()
            torch.mul(b[t].unsqueeze(2), drive[t].unsqueeze(1), out=states[t])
            state = states[t].addcmul_(decay, state)
        ctx.save_for_backward(step, drive, a, b, c, states)
        return (c.unsqueeze(2) @ states).squeeze(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, ...]:
        """Carry the gradient of the state from the last time step to the first."""
        step, drive, a, b, c, states = ctx.saved_tensors
        grad_step, grad_drive = torch.empty_like(step), torch.empty_like(drive)
        grad_a, grad_b = torch.zeros_like(a), torch.empty_like(b)
        grad_c = (states @ grad_y.unsqueeze(3)).squeeze(3)
        grad, flow = torch.zeros_like(states[0]), torch.empty_like(states[0])
        for t in reversed(range(len(step))):
            grad.addcmul_(c[t].unsqueeze(2), grad_y[t].unsqueeze(1))
            torch.sum(torch.mul(grad, b[t].unsqueeze(2), out=flow), 1, out=grad_drive[t])
            torch.sum(torch.mul(grad, drive[t].unsqueeze(1), out=flow), 2, out=grad_b[t])
            grad.mul_(torch.mul(a, step[t].unsqueeze(1), out=flow).exp_())
            # At t = 0 the state before is zero, and so is the gradient of its decay.
            torch.mul(grad, states[t - 1], out=flow) if t else flow.zero_()
            grad_a.add_((flow * step[t].unsqueeze(1)).sum(0))
            torch.sum(flow.mul_(a), 1, out=grad_step[t])
        return grad_step, grad_drive, grad_a, grad_b, grad_c


def selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    **_: object,
) -> Tensor:
    """Stand in for the scan of transformers in training, where no final state is asked for."""
    step = F.softplus(dt.float() + delta_bias[:, None])
    drive = step * hidden_states.float()
    step, drive, b, c = (
        tensor.float().permute(2, 0, 1).contiguous() for tensor in (step, drive, b, c)
    )
    # The scan runs in single precision whatever the precision of the layers around it.
    with torch.autocast(hidden_states.device.type, enabled=False):
        y = _Scan.apply(step, drive, a.t().contiguous(), b, c).permute(1, 2, 0)
    return (y + hidden_states * D[:, None]) * F.silu(z)


def install() -> None:
    """Make the Mamba models of this process train with the scan of this module."""
    modeling_mamba.mamba_selective_scan = selective_scan
