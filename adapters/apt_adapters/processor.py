"""Running state-space models of transformers on a processor.

transformers chooses kernels when a model's module is imported, by whether the packages import; what
tensors they will get is not asked. On a processor the kernels of mamba_ssm cannot run, and where
there are none, the scan in plain torch is the bottleneck. So while a model on a processor is run,
its functions are the ones in plain torch, and the scan is ours (`apt_adapters.scan`).
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
# What transformers takes from mamba_ssm and causal_conv1d where they import.
_KERNELS = (
    "mamba_inner_fn", "mamba_selective_state_update", "mamba2_split_conv1d_scan_combined",
    "mamba2_selective_state_update", "mamba2_chunk_scan", "causal_conv1d_fn",
    "causal_conv1d_update",
)  # fmt: skip

_lock = Lock()
_inside: dict[str, int] = {}  # by module: how often it is entered, in all threads
_before: dict[str, dict[str, Any]] = {}


@contextmanager
def on_processor(model: nn.Module) -> Iterator[None]:
    """Run ``model`` with functions for a processor while this is entered, if it lies on one."""
    if next(model.parameters()).device.type != "cpu":
        yield
        return
    with without_kernels(model):
        yield


@contextmanager
def without_kernels(model: nn.Module) -> Iterator[None]:
    """Run ``model`` in plain torch while this is entered, wherever it lies.

    The last one out, of all threads, restores the functions of the model's module. Releases of
    transformers that keep the scan inside the mixer are left as they are.
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
            mine = {name: _OURS[name] for name in _OURS if hasattr(module, name)}
            for name in _KERNELS:
                if plain := getattr(getattr(module, name, None), "__wrapped__", None):
                    mine[name] = plain
            _before[module.__name__] = {name: getattr(module, name) for name in mine}
            vars(module).update(mine)
        _inside[module.__name__] = _inside.get(module.__name__, 0) + 1


def _leave(module: ModuleType) -> None:
    with _lock:
        _inside[module.__name__] -= 1
        if not _inside[module.__name__]:
            vars(module).update(_before.pop(module.__name__))
