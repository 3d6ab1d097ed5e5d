"""The selective scan of Mamba on a CPU: chunk by chunk, with a custom gradient.

The scan of transformers without kernels allocates tensors of (batch, length, channels, state) and
slices them at every time step. The gradient of each slice is a tensor as large as the whole, so
the time of a backward pass is quadratic in the length. The scan of this module processes a chunk of
time steps at a time, in a buffer that stays in the CPU's cache. The gradient runs over the same
chunks backwards, and recomputes their states from the first state of each chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Numbers in one chunk of states: 4 MiB in fp32. Twice as much is in use at a time.
_CHUNK = 2**20

# Shapes: L is the length, B the batch, D the channels and N the size of the state. Time comes first
# and channels last, so that every operation runs over contiguous rows of channels.


def _chunks(length: int, size: int) -> Iterator[slice]:
    """Slices of time whose chunk of states (T, ``size``) fits into the cache."""
    steps = max(1, min(length, _CHUNK // size))
    return (slice(start, min(start + steps, length)) for start in range(0, length, steps))


def _states(
    start: Tensor, step: Tensor, drive: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """The states (T, B, N, D) of a chunk that follows the state ``start``, and their decays."""
    decay = (a * step.unsqueeze(2)).exp_()
    states = b.unsqueeze(3) * drive.unsqueeze(2)
    for state, decayed in zip(states.unbind(), decay.unbind(), strict=True):
        start = state.addcmul_(decayed, start)
    return states, decay


class _Scan(torch.autograd.Function):
    """The recurrence ``h[t] = exp(a step[t]) h[t-1] + b[t] drive[t]``, ``y[t] = c[t] h[t]``."""

    @staticmethod
    def forward(
        ctx: Any, step: Tensor, drive: Tensor, a: Tensor, b: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return y (L, B, D) and the last state (B, N, D).

        Args:
            ctx: the context for the gradient.
            step, drive: (L, B, D).
            a: (N, D).
            b, c: (L, B, N).
        """
        length, batch, width = step.shape
        state = step.new_zeros(batch, a.shape[0], width)
        y, starts = torch.empty_like(step), []
        for part in _chunks(length, state.numel()):
            starts.append(state)
            states, _ = _states(state, step[part], drive[part], a, b[part])
            y[part] = (c[part].unsqueeze(2) @ states).squeeze(2)
            state = states[-1].clone()
        ctx.save_for_backward(step, drive, a, b, c, torch.stack(starts))
        ctx.mark_non_differentiable(state)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        """Carry the gradient of the state from the last time step to the first."""
        step, drive, a, b, c, starts = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (step, drive, b, c)]
        grad_step, grad_drive, grad_b, grad_c = grads
        grad_a, carried = torch.zeros_like(a), torch.zeros_like(starts[0])
        parts = list(_chunks(len(step), carried.numel()))
        for start, part in reversed(list(zip(starts, parts, strict=True))):
            states, decay = _states(start, step[part], drive[part], a, b[part])
            grad_c[part] = (states @ grad_y[part].unsqueeze(3)).squeeze(3)
            flow = c[part].unsqueeze(3) * grad_y[part].unsqueeze(2)
            backwards = zip(reversed(flow.unbind()), reversed(decay.unbind()), strict=True)
            for gradient, decayed in backwards:
                carried = gradient.add_(carried).mul(decayed)
            grad_drive[part] = (b[part].unsqueeze(2) @ flow).squeeze(2)
            grad_b[part] = (flow @ drive[part].unsqueeze(3)).squeeze(3)
            # The gradient of the exponent; the state before the first step of a chunk is its start.
            flow[1:].mul_(states[:-1])
            flow[0].mul_(start)
            flow.mul_(decay)
            grad_step[part] = (flow * a).sum(2)
            grad_a += (flow * step[part].unsqueeze(2)).sum((0, 1))
        return grad_step, grad_drive, grad_a, grad_b, grad_c


def selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """The scan with the signature of transformers and mamba_ssm, in fp32 or fp64.

    Args:
        hidden_states, dt: (batch, channels, length).
        A: (channels, state).
        B, C: (batch, state, length).
        D: the weight of the skip (channels,).
        z: the gate (batch, channels, length).
        delta_bias: added to ``dt`` (channels,).
        delta_softplus: True to apply a softplus to ``dt``.
        return_last_state: True to return the last state as well.

    Returns:
        The output (batch, channels, length) in the dtype of ``hidden_states``, and on request the
        last state (batch, channels, state).
    """
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    with torch.autocast(hidden_states.device.type, enabled=False):
        time_first = (x.to(dtype).permute(2, 0, 1).contiguous() for x in (hidden_states, dt, B, C))
        inputs, step, b, c = time_first
        if delta_bias is not None:
            step = step + delta_bias
        if delta_softplus:
            step = F.softplus(step)
        y, state = _Scan.apply(step, step * inputs, A.to(dtype).t().contiguous(), b, c)  # type: ignore[no-untyped-call]
        if D is not None:
            y = y + inputs * D
        y = y.permute(1, 2, 0)
        if z is not None:
            y = y * F.silu(z.to(dtype))
    y = y.to(hidden_states.dtype)
    return (y, state.transpose(1, 2)) if return_last_state else y


@torch.no_grad()
def both_scans(
    step: Tensor, drive: Tensor, a: Tensor, b: Tensor, c: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Two scans in parts: one with the given decays, one with the decay ``exp(-step)`` everywhere.

    Args:
        step, drive: (batch, channels, length), in fp32.
        a: (channels, state).
        b, c: (batch, state, length).

    Yields:
        A slice of time, the output of the first scan (T, batch, channels), and the difference of
        every state's contribution between the two scans (T, batch, state, channels).
    """
    step, drive, b, c = (x.permute(2, 0, 1).contiguous() for x in (step, drive, b, c))
    decays = a.t().contiguous()
    state = step.new_zeros(step.shape[1], *decays.shape)
    plain = state
    for part in _chunks(len(step), 2 * state.numel()):
        states, _ = _states(state, step[part], drive[part], decays, b[part])
        plains, _ = _states(plain, step[part], drive[part], torch.full_like(decays, -1.0), b[part])
        y = (c[part].unsqueeze(2) @ states).squeeze(2)
        yield part, y, (states - plains) * c[part].unsqueeze(3)
        state, plain = states[-1].clone(), plains[-1].clone()
