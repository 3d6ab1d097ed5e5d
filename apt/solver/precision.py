"""Full fp32 products whatever the settings of the process, and the test for fast bf16 products."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch

from apt.devices import device_kinds

_lock = Lock()
_entered = 0  # the entered contexts of all threads: torch's settings belong to the process
_previous: "PrecisionSettings"


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
            for device in device_kinds():
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        _leave()


def _enter() -> None:
    global _entered, _previous
    with _lock:
        if not _entered:
            _previous = require_full()
        _entered += 1


def _leave() -> None:
    global _entered
    with _lock:
        _entered -= 1
        if not _entered:
            restore(_previous)


Operation = tuple[str, str]  # a backend and one of its operations, as torch names them
_ROOT: Operation = ("generic", "all")
_PRODUCTS: tuple[Operation, ...] = (("cuda", "matmul"), ("mkldnn", "matmul"))
_FULL = ("none", "ieee")
_HIGHEST = "highest"
_get: Any = getattr(torch._C, "_get_fp32_precision_getter", None)
_set: Any = getattr(torch._C, "_set_fp32_precision_setter", None)


@dataclass(frozen=True)
class PrecisionSettings:
    """The settings of fp32 products before `require_full`; torch has two that must agree.

    Since torch 2.9, each backend has a setting for its products
    (``torch.backends.fp32_precision``). It is inherited from a parent if it is not set. The older
    setting for all backends (`torch.set_float32_matmul_precision`) overwrites the new settings. It
    cannot be read if it disagrees with them, as happens after a change of a new setting alone.

    Attributes:
        changed: the new settings of the operations that were changed; "none" if inherited.
    """

    older: str
    changed: Mapping[Operation, str]


def require_full() -> PrecisionSettings:
    """Allow only full fp32 products, and return the settings before; change no more than needed."""
    operations = _PRODUCTS if _get is not None else ()
    explicit = {operation: _explicit_setting(operation) for operation in operations}
    reduced = [operation for operation in operations if _get(*operation) not in _FULL]
    for operation in reduced:
        _set(*operation, "ieee")
    older = torch.get_float32_matmul_precision()  # no error: the two settings agree now
    if older == _HIGHEST:
        return PrecisionSettings(older, {operation: explicit[operation] for operation in reduced})
    torch.set_float32_matmul_precision(_HIGHEST)
    return PrecisionSettings(older, explicit)


def restore(settings: PrecisionSettings) -> None:
    """Undo `require_full`, which returned ``settings``."""
    if settings.older != _HIGHEST:
        torch.set_float32_matmul_precision(settings.older)
    for operation, value in settings.changed.items():
        _set(*operation, value)


def _explicit_setting(operation: Operation) -> str:
    """The setting of the operation itself, "none" if it is inherited.

    torch returns the effective value, inherited or not. A value equal to the value of the parent is
    inherited if both change together. To test this, the parent is set to full precision and then
    set back.
    """
    value: str = _get(*operation)
    parent = _ROOT if operation[1] == "all" else (operation[0], "all")
    if value in _FULL or operation == _ROOT or value != _get(*parent):
        return value
    parent_setting = _explicit_setting(parent)
    _set(*parent, "ieee")
    inherited = _get(*operation) != value
    _set(*parent, parent_setting)
    return "none" if inherited else value
