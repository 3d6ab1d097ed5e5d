"""State-space models of transformers on a CPU.

transformers selects kernels when a model's module is imported, if the kernel packages can be
imported; the device of the tensors is not considered. The kernels of mamba_ssm cannot run on a CPU.
Without kernels, the scan of transformers in plain torch is the bottleneck. So while a model runs on
a CPU, its functions are replaced by functions in plain torch, and its scan by the one in
`apt_adapters.scan`.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from types import ModuleType
from typing import Any

from torch import nn

from apt_adapters.scan import selective_scan

_OURS = {"mamba_selective_scan": selective_scan}
# The functions that transformers imports from mamba_ssm and causal_conv1d if they are installed.
_KERNELS = (
    "mamba_inner_fn", "mamba_selective_state_update", "mamba2_split_conv1d_scan_combined",
    "mamba2_selective_state_update", "mamba2_chunk_scan", "causal_conv1d_fn",
    "causal_conv1d_update",
)  # fmt: skip

_lock = Lock()
_inside: dict[str, int] = {}  # by module: the number of entered contexts in all threads
_before: dict[str, dict[str, Any]] = {}


@contextmanager
def on_processor(model: nn.Module) -> Iterator[None]:
    """Inside the context, run ``model`` with functions for a CPU, if it is on a CPU."""
    if next(model.parameters()).device.type != "cpu":
        yield
        return
    with without_kernels(model):
        yield


@contextmanager
def without_kernels(model: nn.Module) -> Iterator[None]:
    """Inside the context, run ``model`` in plain torch, on any device.

    Several threads may enter at the same time: the functions of the model's module are restored
    when the last thread leaves. Releases of transformers with the scan inside the mixer are not
    changed.
    """
    module = sys.modules[type(model).__module__]
    _enter(module)
    try:
        yield
    finally:
        _leave(module)


def _enter(module: ModuleType) -> None:
    with _lock:
        if not _inside.get(module.__name__):
            replacements = {name: _OURS[name] for name in _OURS if hasattr(module, name)}
            for name in _KERNELS:
                if function := getattr(getattr(module, name, None), "__wrapped__", None):
                    replacements[name] = function
            _before[module.__name__] = {name: getattr(module, name) for name in replacements}
            vars(module).update(replacements)
        _inside[module.__name__] = _inside.get(module.__name__, 0) + 1


def _leave(module: ModuleType) -> None:
    with _lock:
        _inside[module.__name__] -= 1
        if not _inside[module.__name__]:
            vars(module).update(_before.pop(module.__name__))
