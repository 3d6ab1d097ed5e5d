"""Reference implementations of Mamba's mixers in fp64 and plain torch, with all inputs of weights.

An oracle that shares no code with transformers, mamba_ssm or the weight tap. It returns the input
of every Linear by name, and the mixer's output.
"""

import torch
import torch.nn.functional as F


def _linear(inputs, layer):
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(inputs, layer.weight.double(), bias)


def _convolved(x, layer):
    """Causal and depthwise, over (batch, length, channels), then SiLU."""
    weight = layer.weight.double()
    width = weight.shape[-1]
    padded = F.pad(x.transpose(1, 2), (width - 1, 0))
    parts = [weight[:, 0, k, None] * padded[..., k : k + x.shape[1]] for k in range(width)]
    total = sum(parts)
    if layer.bias is not None:
        total = total + layer.bias.double()[:, None]
    return F.silu(total).transpose(1, 2)


def _normed(x, eps, weight=None):
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x if weight is None else x * weight.double()


def mamba(mixer, x, *, rank, state, eps=None):
    """Mamba 1; with ``eps``, FalconMamba, that normalises the time step, B and C."""
    inputs, x = {"in_proj": x.double()}, x.double()
    x, gate = _linear(x, mixer.in_proj).chunk(2, -1)
    x = inputs["x_proj"] = _convolved(x, mixer.conv1d)
    dt, b, c = _linear(x, mixer.x_proj).split([rank, state, state], -1)
    if eps is not None:
        dt, b, c = _normed(dt, eps), _normed(b, eps), _normed(c, eps)
    inputs["dt_proj"] = dt
    step = F.softplus(_linear(dt, mixer.dt_proj))
    a, h, ys = -mixer.A_log.double().exp(), 0.0, []
    for t in range(x.shape[1]):
        decay = (step[:, t, :, None] * a).exp()
        h = decay * h + step[:, t, :, None] * b[:, t, None] * x[:, t, :, None]
        ys.append((h * c[:, t, None]).sum(-1))
    y = torch.stack(ys, 1) + mixer.D.double() * x
    y = inputs["out_proj"] = y * F.silu(gate)
    return inputs, _linear(y, mixer.out_proj)


def mamba2(mixer, x, *, heads, width, groups, state, eps):
    """Mamba 2, gated before the norm."""
    inputs, x = {"in_proj": x.double()}, x.double()
    inner = heads * width
    sizes = [inner, inner + 2 * groups * state, heads]
    gate, xbc, dt = _linear(x, mixer.in_proj).split(sizes, -1)
    x, b, c = _convolved(xbc, mixer.conv1d).split([inner, groups * state, groups * state], -1)
    step = F.softplus(dt + mixer.dt_bias.double())
    batch, length = x.shape[:2]
    x = x.view(batch, length, heads, width)
    b, c = (
        part.view(batch, length, groups, state).repeat_interleave(heads // groups, 2)
        for part in (b, c)
    )
    a, h, ys = -mixer.A_log.double().exp(), 0.0, []
    for t in range(length):
        decay = (step[:, t] * a).exp()[..., None, None]
        h = decay * h + (step[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        ys.append((h * c[:, t, :, None]).sum(-1))
    y = torch.stack(ys, 1) + mixer.D.double()[:, None] * x
    y = y.reshape(batch, length, inner) * F.silu(gate)
    norm = mixer.norm
    grouped = y.view(batch, length, groups, inner // groups)
    y = inputs["out_proj"] = _normed(grouped, eps).flatten(2) * norm.weight.double()
    return inputs, _linear(y, mixer.out_proj)
