"""Full fp32 products, whatever the process has been told to allow; and bf16 where they will do."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch

from apt.solver.fp32 import Allowed, require_full, restore

_lock = Lock()
_inside = (
    0  # how many are entered, in all threads: what torch allows is the process', not a thread's
)
_allowed: Allowed


@contextmanager
def full_precision() -> Iterator[None]:
    """Keep TF32 and bf16 out of fp32 products while this is entered; also a decorator.

    Gram matrices and their factors do not survive products of 10 or 7 bits: neighbouring columns
    of activations are nearly dependent. The last one out restores what was allowed, so that runs in
    several threads do not undo each other's.
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware, several times as fast as fp32."""
    if device.type == "cuda":
        supported: bool = torch.cuda.is_bf16_supported(including_emulation=False)
        return supported
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    return device.type == "cpu" and bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def _enter() -> None:
    global _inside, _allowed
    with _lock:
        if not _inside:
            _allowed = require_full()
        _inside += 1


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if not _inside:
            restore(_allowed)
