"""The modes of torch in which the public functions compute, whatever the caller has set."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock

import torch

from apt.devices import kinds

_lock = Lock()
_inside = 0  # the entered contexts of all threads: the default dtype belongs to the process
_before: torch.dtype


@contextmanager
def usual_modes() -> Iterator[None]:
    """A context manager and decorator: torch's modes are those of a new process inside.

    These are the default dtype and device, autocast, inference mode and the recording of gradients.
    The same call gives the same bytes in all of the caller's modes. Several threads may be inside
    at once: the default dtype is restored when the last one leaves.
    """
    _enter()
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(mode=False))  # gradients are recorded too
            for kind in kinds():
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            if torch.get_default_device().type != "cpu":
                stack.enter_context(torch.device("cpu"))
            yield
    finally:
        _leave()


def _enter() -> None:
    global _inside, _before
    with _lock:
        if not _inside:
            _before = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
        _inside += 1


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if not _inside:
            torch.set_default_dtype(_before)
