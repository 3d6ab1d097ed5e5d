"""What a state-space mixer has beside its Linears, and what removing parts of it does.

*conv1d*: each channel of the depthwise convolution multiplies its last few inputs. *D* multiplies
the scan's input on its way past the scan. *A_log*: a zero stands for the decay ``exp(-step)``; what
that changes is found by scanning once more with it. The states of a channel do not mix, so the
error of removing several of its entries is the sum of their changes, whose Gram matrix over tokens
says it all. (SparseSSM, arXiv 2506.09613, ranks the entries by ``A_log²`` and the states' squares.)

What the scan's parts change is measured where ``out_proj`` reads it, gated and normalised. The
convolution is measured as it is: weighted by the slope of its activation, it cost perplexity.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt.adapter import Effects, Extra
from apt.errors import AptError
from apt_adapters.scan import both_scans, selective_scan

_lock = Lock()  # functions of a module are replaced: one run at a time
_WATCHED = ("causal_conv1d_fn", "mamba_selective_scan", "mamba2_chunk_scan")
_Take = Callable[[str, Tensor, float], None]


def extras_of(mixer: str, block: nn.Module) -> list[Extra]:
    """The extras of the mixer of that name in ``block``, if there is one."""
    if not hasattr(block, mixer):
        return []
    return [
        Extra("conv1d", f"{mixer}.conv1d", f"{mixer}.conv1d.weight"),
        Extra("A_log", f"{mixer}.A_log", f"{mixer}.A_log", removal="effect"),
        Extra("D", f"{mixer}.D", f"{mixer}.D"),
    ]


@contextmanager
def effects_of(mixer: nn.Module, extras: Sequence[Extra], sink: Effects) -> Iterator[None]:
    """While entered, hand over what the extras of ``mixer`` do (`apt.adapter.Adapter.effects`).

    The scan runs in plain torch meanwhile, on a GPU as well.

    Raises:
        AptError: this release of transformers has the functions inside the mixer.
    """
    module = sys.modules[type(mixer).__module__]
    wanted, owner = {extra.kind: extra for extra in extras}, get_ident()

    def take(kind: str, gram: Tensor, energy: float) -> None:
        if kind in wanted and get_ident() == owner:
            sink(wanted[kind], gram, energy)

    with _lock:
        before = {name: getattr(module, name) for name in _WATCHED if hasattr(module, name)}
        if len(before) < 2:
            raise AptError(
                "beyond its Linears this model is pruned with transformers 5.24 or newer only",
                "upgrade transformers",
                ("also",),
            )
        heads = _Heads(mixer, take)
        watched = {
            "causal_conv1d_fn": lambda plain: _conv(plain, take),
            "mamba_selective_scan": lambda plain: _scan(take),
            "mamba2_chunk_scan": heads.scan,
        }
        vars(module).update(
            {n: watched[n](getattr(f, "__wrapped__", f)) for n, f in before.items()}
        )
        try:
            yield
        finally:
            vars(module).update(before)
            heads.close()


def _conv(plain: Any, take: _Take) -> Any:
    """The convolution, watched."""

    def watched(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        gram, weights = _lagged(x, weight.shape[-1]), weight.double()
        take("conv1d", gram, float(torch.einsum("ck,ckl,cl->", weights, gram, weights)))
        result: Tensor = plain(x, weight, *args, **kwargs)
        return result

    return watched


def _lagged(x: Tensor, width: int) -> Tensor:
    """The Gram matrices (channels, width, width) of the last inputs of x (batch, channels, L)."""
    length = x.shape[-1]
    padded = F.pad(x.double(), (width - 1, 0))
    lags = [padded[..., lag : lag + length] for lag in range(width)]
    gram = x.new_zeros(x.shape[1], width, width, dtype=torch.float64)
    for i, left in enumerate(lags):
        for j, right in enumerate(lags[: i + 1]):
            gram[:, i, j] = gram[:, j, i] = (left * right).sum((0, 2))
    return gram


def _scan(take: _Take) -> Any:
    """The scan of Mamba 1, watched behind its gate."""

    def watched(hidden_states: Tensor, dt: Tensor, A: Tensor, *args: Any, **kwargs: Any) -> Any:
        _take_scan(take, hidden_states, dt, A, *args, **kwargs)
        return selective_scan(hidden_states, dt, A, *args, **kwargs)

    return watched


def _take_scan(
    take: _Take,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    **_: Any,
) -> None:
    """Of a scan as transformers calls it, what A_log and D do."""
    gate = torch.ones_like(hidden_states).float() if z is None else F.silu(z.float())
    step = dt.float() if delta_bias is None else dt.float() + delta_bias[:, None]
    step = F.softplus(step) if delta_softplus else step
    skipped = hidden_states.float() * gate
    gram = A.new_zeros(*A.shape, A.shape[1], dtype=torch.float64)
    energy = 0.0
    passed = skipped * D[:, None] if D is not None else torch.zeros_like(skipped)
    parts = both_scans(step, step * hidden_states.float(), A.float(), B.float(), C.float())
    for part, y, change in parts:
        gated = gate[:, :, part].permute(2, 0, 1)
        change = (change * gated.unsqueeze(2)).permute(3, 0, 1, 2).flatten(1, 2)
        gram += change.mT @ change
        energy += float((y * gated + passed[:, :, part].permute(2, 0, 1)).double().square().sum())
    take("A_log", gram, energy)
    take("D", skipped.double().square().sum((0, 2)).view(-1, 1, 1), energy)


class _Heads:
    """The scan of Mamba 2, watched behind the gate and the norm where the mixer has one."""

    def __init__(self, mixer: nn.Module, take: _Take) -> None:
        self._take = take
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None
        norm: Any = getattr(mixer, "norm", None)
        self._hook = None
        if hasattr(norm, "group_size"):
            self._hook = norm.register_forward_pre_hook(self._normed, with_kwargs=True)

    def close(self) -> None:
        """Leave nothing on the mixer."""
        if self._hook is not None:
            self._hook.remove()

    def scan(self, plain: Any) -> Any:
        """``plain``, watched."""

        def watched(hidden_states: Tensor, dt: Tensor, A: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = plain(hidden_states, dt, A, *args, **kwargs)
            y = result[0] if isinstance(result, tuple) else result
            once = {**kwargs, "return_final_states": False}
            without = plain(hidden_states, dt, torch.full_like(A, -1.0), *args, **once)
            self._seen = y, y - without, hidden_states
            if self._hook is None:
                self._hand_over(torch.ones_like(y))
            return result

        return watched

    def _normed(self, norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("hidden_states", "gate"), args, strict=False)) | kwargs
        gate = F.silu(given["gate"].float())
        gated = given["hidden_states"].float() * gate
        groups = gated.view(*gated.shape[:-1], -1, norm.group_size)
        size = torch.rsqrt(groups.square().mean(-1, keepdim=True) + norm.variance_epsilon)
        sizes = size.expand_as(groups).reshape(gated.shape)
        self._hand_over(gate * sizes * norm.weight)

    def _hand_over(self, scale: Tensor) -> None:
        """Every value of the scan's product times ``scale``, in the shape of either."""
        assert self._seen is not None
        y, change, skipped = (
            (x.float() * scale.view_as(x)).double().square().sum((0, 1, 3)) for x in self._seen
        )
        energy = float(y.sum())
        self._take("A_log", change.view(-1, 1, 1), energy)
        self._take("D", skipped.view(-1, 1, 1), energy)
        self._seen = None
