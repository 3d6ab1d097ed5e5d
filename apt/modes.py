"""The modes of torch in which the public functions compute, independent of the caller's modes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock

import torch

from apt.devices import device_kinds

_lock = Lock()
_entered = 0  # contexts entered by all threads: the default dtype belongs to the process
_caller_dtype: torch.dtype


@contextmanager
def default_modes() -> Iterator[None]:
    """While entered, torch has the modes of a new process; also a decorator.

    The modes are the default dtype and device, autocast, inference mode and the recording of
    gradients. So the same call gives the same bytes in all modes of the caller. Several threads may
    enter at once: the default dtype is restored when the last thread leaves.
    """
    _enter()
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(mode=False))  # gradients are recorded too
            for kind in device_kinds():
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            if torch.empty(0).device.type != "cpu":  # torch 2.6 does not tell that of a context
                stack.enter_context(torch.device("cpu"))
            yield
    finally:
        _leave()


def _enter() -> None:
    global _entered, _caller_dtype
    with _lock:
        if not _entered:
            _caller_dtype = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
        _entered += 1


def _leave() -> None:
    global _entered
    with _lock:
        _entered -= 1
        if not _entered:
            torch.set_default_dtype(_caller_dtype)
