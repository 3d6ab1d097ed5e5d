"""The extras of a state-space mixer, and the effects of their removal.

*conv1d*: each channel of the depthwise convolution multiplies its last few inputs. *D* multiplies
the input of the scan, in the skip connection around it. *A_log*: a zero gives the decay
``exp(-step)``; a second scan with this decay gives the change. The states of a channel do not mix,
so the error of the removal of several entries is the sum of their changes, and the Gram matrix of
the changes over tokens determines it. (SparseSSM, arXiv 2506.09613, ranks the entries by ``A_log²``
and the squares of the states.)

The changes by A_log and D are measured at the input of ``out_proj``, after the gate and the norm.
The change by the convolution is measured at its output. A weighting by the slope of the activation
gave a higher perplexity.
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
    """The extras of the submodule ``mixer`` of ``block``; none if ``block`` has no such module."""
    if not hasattr(block, mixer):
        return []
    return [
        Extra("conv1d", f"{mixer}.conv1d", f"{mixer}.conv1d.weight"),
        Extra("A_log", f"{mixer}.A_log", f"{mixer}.A_log", removal="effect"),
        Extra("D", f"{mixer}.D", f"{mixer}.D"),
    ]


@contextmanager
def effects_of(mixer: nn.Module, extras: Sequence[Extra], sink: Effects) -> Iterator[None]:
    """Inside the context, report the effects of ``mixer``'s extras; see `Adapter.effects`.

    The scan runs in plain torch, even on a GPU.

    Raises:
        AptError: in this release of transformers, the functions are inside the mixer.
    """
    module = sys.modules[type(mixer).__module__]
    extra_of_kind, owner = {extra.kind: extra for extra in extras}, get_ident()

    def take(kind: str, gram: Tensor, energy: float) -> None:
        if kind in extra_of_kind and get_ident() == owner:
            sink(extra_of_kind[kind], gram, energy)

    with _lock:
        originals = {name: getattr(module, name) for name in _WATCHED if hasattr(module, name)}
        if len(originals) < 2:
            raise AptError(
                "beyond its Linears, this model can only be pruned with transformers 5.24 or newer",
                "upgrade transformers",
                ("also",),
            )
        heads = _Heads(mixer, take)
        replacements = {
            "causal_conv1d_fn": lambda plain: _conv(plain, take),
            "mamba_selective_scan": lambda plain: _scan(take),
            "mamba2_chunk_scan": heads.scan,
        }
        vars(module).update(
            {n: replacements[n](getattr(f, "__wrapped__", f)) for n, f in originals.items()}
        )
        try:
            yield
        finally:
            vars(module).update(originals)
            heads.close()


def _conv(plain: Any, take: _Take) -> Any:
    """The convolution ``plain``, with its effects reported to ``take``."""

    def reporting(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        gram, weights = _lagged(x, weight.shape[-1]), weight.double()
        take("conv1d", gram, float(torch.einsum("ck,ckl,cl->", weights, gram, weights)))
        result: Tensor = plain(x, weight, *args, **kwargs)
        return result

    return reporting


def _lagged(x: Tensor, width: int) -> Tensor:
    """The Gram matrices (channels, width, width) of ``width`` lagged copies of x.

    The shape of x is (batch, channels, L).
    """
    length = x.shape[-1]
    padded = F.pad(x.double(), (width - 1, 0))
    lags = [padded[..., lag : lag + length] for lag in range(width)]
    gram = x.new_zeros(x.shape[1], width, width, dtype=torch.float64)
    for i, left in enumerate(lags):
        for j, right in enumerate(lags[: i + 1]):
            gram[:, i, j] = gram[:, j, i] = (left * right).sum((0, 2))
    return gram


def _scan(take: _Take) -> Any:
    """The scan of Mamba 1; its effects after the gate are reported to ``take``."""

    def reporting(hidden_states: Tensor, dt: Tensor, A: Tensor, *args: Any, **kwargs: Any) -> Any:
        _take_scan(take, hidden_states, dt, A, *args, **kwargs)
        return selective_scan(hidden_states, dt, A, *args, **kwargs)

    return reporting


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
    """Report the effects of A_log and D to ``take``, for a scan with these arguments."""
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
    """The scan of Mamba 2; its effects are reported after the gate and the norm, if any."""

    def __init__(self, mixer: nn.Module, take: _Take) -> None:
        self._take = take
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None
        norm: Any = getattr(mixer, "norm", None)
        self._hook = None
        if hasattr(norm, "group_size"):
            self._hook = norm.register_forward_pre_hook(self._before_norm, with_kwargs=True)

    def close(self) -> None:
        """Remove the hook from the mixer."""
        if self._hook is not None:
            self._hook.remove()

    def scan(self, plain: Any) -> Any:
        """The scan ``plain``, with its outputs recorded."""

        def recording(
            hidden_states: Tensor, dt: Tensor, A: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            result = plain(hidden_states, dt, A, *args, **kwargs)
            y = result[0] if isinstance(result, tuple) else result
            options = {**kwargs, "return_final_states": False}
            without = plain(hidden_states, dt, torch.full_like(A, -1.0), *args, **options)
            self._seen = y, y - without, hidden_states
            if self._hook is None:
                self._report(torch.ones_like(y))
            return result

        return recording

    def _before_norm(self, norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = dict(zip(("hidden_states", "gate"), args, strict=False)) | kwargs
        gate = F.silu(arguments["gate"].float())
        gated = arguments["hidden_states"].float() * gate
        groups = gated.view(*gated.shape[:-1], -1, norm.group_size)
        size = torch.rsqrt(groups.square().mean(-1, keepdim=True) + norm.variance_epsilon)
        sizes = size.expand_as(groups).reshape(gated.shape)
        self._report(gate * sizes * norm.weight)

    def _report(self, scale: Tensor) -> None:
        """Report the effects of A_log and D: the recorded values, times ``scale``, squared."""
        assert self._seen is not None
        y, change, skipped = (
            (x.float() * scale.view_as(x)).double().square().sum((0, 1, 3)) for x in self._seen
        )
        energy = float(y.sum())
        self._take("A_log", change.view(-1, 1, 1), energy)
        self._take("D", skipped.view(-1, 1, 1), energy)
        self._seen = None
