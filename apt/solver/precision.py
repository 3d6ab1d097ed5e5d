"""Full fp32 products, whatever the process has been told to allow."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch

_lock = Lock()
_inside = (
    0  # how many are entered, in all threads: what torch allows is the process', not a thread's
)
_allowed = "highest"


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


def _enter() -> None:
    global _inside, _allowed
    with _lock:
        if not _inside:
            _allowed = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
        _inside += 1


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if not _inside:
            torch.set_float32_matmul_precision(_allowed)
