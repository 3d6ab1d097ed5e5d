"""Full fp32 products whatever the settings of the process, and the test for fast bf16 products."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any

import torch

from apt.solver.fp32 import PrecisionSettings, require_full, restore

_lock = Lock()
_inside = 0  # the entered contexts of all threads: torch's settings belong to the process
_before: PrecisionSettings


@contextmanager
def full_precision() -> Iterator[None]:
    """A context manager and decorator: fp32 products use neither TF32 nor bf16 inside.

    Gram matrices and their factors need more than the 10 or 7 mantissa bits of these formats:
    neighbouring columns of activations are nearly linearly dependent. `torch.autocast` has no
    effect inside, and no gradients are recorded. Several threads may be inside at once: the
    settings are restored when the last one leaves.
    """
    _enter()
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        _leave()


def multiplies_bf16(device: torch.device) -> bool:
    """True if the device multiplies bf16 in hardware, several times as fast as fp32."""
    if device.type == "cuda":
        supported: bool = torch.cuda.is_bf16_supported(including_emulation=False)
        return supported
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    return device.type == "cpu" and bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def _enter() -> None:
    global _inside, _before
    with _lock:
        if not _inside:
            _before = require_full()
        _inside += 1


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if not _inside:
            restore(_before)
