"""Stand-ins on a CPU for the two CUDA extensions of mamba_ssm and causal_conv1d.

Only the compiled parts are replaced, by the packages' own reference functions or plain torch: all
of their Python runs as it does on a GPU, the fused autograd functions included. Kernels written in
Triton run in its interpreter.
"""

import os
import sys
from contextlib import nullcontext
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor


def _reference(u, delta, A, B, C, D, delta_bias, softplus):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

    return selective_scan_ref(u, delta, A, B, C, D, None, delta_bias, softplus, True)


def scan_fwd(u, delta, A, B, C, D, z, delta_bias, softplus):
    """As ``selective_scan_cuda.fwd``."""
    out, last = _reference(u, delta, A, B, C, D, delta_bias, softplus)
    kept = last.new_zeros(*last.shape[:2], 1, 2 * last.shape[2])
    kept[:, :, 0, 1::2] = last
    return (out, kept) if z is None else (out, kept, out * F.silu(z))


def scan_bwd(u, delta, A, B, C, D, z, delta_bias, grad, kept, out, dz, softplus, recompute):
    """As ``selective_scan_cuda.bwd``, by autograd."""
    given = [u, delta, A, B, C, D, delta_bias, z]
    leaves = [None if x is None else x.detach().requires_grad_() for x in given]
    with torch.enable_grad():
        plain, _ = _reference(*leaves[:7], softplus)
        gated = plain if z is None else plain * F.silu(leaves[7])
    grads = iter(torch.autograd.grad(gated, [x for x in leaves if x is not None], grad))
    found = [None if x is None else next(grads) for x in leaves]
    if dz is not None:
        found[7] = dz.copy_(found[7])
    return (*found[:7], *(() if z is None else (found[7],)), *((gated,) if recompute else ()))


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    # The kernel takes inputs and weights of different precision, and sums in fp32.
    padded, bias = (
        F.pad(x.float(), (weight.shape[-1] - 1, 0)),
        None if bias is None else bias.float(),
    )
    result = F.conv1d(padded, weight.float()[:, None], bias, groups=x.shape[1])
    return (F.silu(result) if silu else result).to(x.dtype)


def conv_fwd(x, weight, bias, seq_idx, initial, out, final, silu):
    """As ``causal_conv1d_cuda.causal_conv1d_fwd``, without sequences or states."""
    assert seq_idx is initial is final is None
    out.copy_(_convolved(x, weight, bias, silu))


def conv_bwd(x, weight, bias, grad, seq_idx, initial, dfinal, dx, dweight, dbias, dinitial, silu):
    """As ``causal_conv1d_cuda.causal_conv1d_bwd``; called below autograd, so written out."""
    width, length = weight.shape[-1], x.shape[-1]
    padded, grad, taps = F.pad(x.float(), (width - 1, 0)), grad.float(), weight.float()
    lags = [padded[..., k : k + length] for k in range(width)]
    if silu:
        before = _convolved(x.float(), weight, bias, False)
        share = before.sigmoid()
        grad = grad * share * (1 + before * (1 - share))
    spread = torch.zeros_like(padded)
    for k, lag in enumerate(lags):
        dweight[:, k] = (grad * lag).sum((0, 2))
        spread[..., k : k + length] += grad * taps[:, k, None]
    dbias.copy_(grad.sum((0, 2)))
    dx.copy_(spread[..., width - 1 :])


def conv_update(x, state, weight, bias, out, silu, lengths, indices):
    """As ``causal_conv1d_cuda.causal_conv1d_update`` for one new token."""
    row = x if x.ndim == 3 else x[..., None]
    whole = torch.cat([state, row], -1)
    state.copy_(whole[..., -state.shape[-1] :])
    width = weight.shape[-1]
    result = F.conv1d(whole[..., -width:], weight[:, None], bias, groups=weight.shape[0])
    out.copy_((F.silu(result) if silu else result).view_as(out))


def install() -> None:
    """Put the stand-ins in place; before mamba_ssm or a model of transformers is imported."""
    os.environ["TRITON_INTERPRET"] = os.environ["MAMBA_DETERMINISTIC"] = "1"
    scan, conv = ModuleType("selective_scan_cuda"), ModuleType("causal_conv1d_cuda")
    scan.fwd, scan.bwd = scan_fwd, scan_bwd
    conv.causal_conv1d_fwd, conv.causal_conv1d_bwd = conv_fwd, conv_bwd
    conv.causal_conv1d_update = conv_update
    sys.modules |= {"selective_scan_cuda": scan, "causal_conv1d_cuda": conv}
    torch.cuda.device = lambda *_: nullcontext()
