"""Snapshots of the state that an adapter must not change: the model, and the state of the process.

A snapshot maps the name of each item to a value that differs if the item has changed. For
parameters the value is torch's version counter: copies of the values would double the memory.
"""

import os
import pickle
import random
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.overrides import _get_current_function_mode_stack, _pop_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from apt.devices import device_kinds, random_state

Snapshot = dict[str, Any]

_PLAIN = (bool, int, float, str)
_CHECKED_ELSEWHERE = {"training", "_is_full_backward_hook"}


def snapshot(model: nn.Module) -> Snapshot:
    """The state of the model and of the process."""
    parts = (_hooks(model), _modules(model), _tensors(model), _code(model))
    return process() | {name: value for part in parts for name, value in part}


@contextmanager
def preserved() -> Iterator[None]:
    """Restore the state of the process at the end, as far as possible."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    dtype, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    hooks = {name: dict(value) for name, value in vars(modules).items() if _is_global(name)}
    modes = len(_get_current_function_mode_stack())  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        try:
            yield
        finally:
            while len(_get_current_function_mode_stack()) > modes:  # type: ignore[no-untyped-call]
                _pop_mode()  # type: ignore[no-untyped-call]
            torch.set_rng_state(states[0])
            random.setstate(states[1])
            np.random.set_state(states[2])
            torch.set_default_dtype(dtype)
            torch.set_grad_enabled(gradients)
            for name, before in hooks.items():
                getattr(modules, name).clear()
                getattr(modules, name).update(before)


def _is_global(name: str) -> bool:
    return name.startswith("_global_") and name.endswith("_hooks")


def process() -> Snapshot:
    """The state of the process and of this thread."""
    return dict(_process())


def changes(before: Snapshot, after: Snapshot) -> list[str]:
    """The differences of two snapshots, in words."""
    lines = [f"leaves {name} behind" for name in after if name not in before]
    lines += [f"takes {name} away" for name in before if name not in after]
    both = before.keys() & after.keys()
    lines += [f"changes {n}" for n in before if n in both and not _equal(before[n], after[n])]
    return lines


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


def _process() -> Iterator[tuple[str, Any]]:
    yield "torch's random state", torch.get_rng_state()
    yield "the random state of Python", random.getstate()
    yield "the random state of numpy", pickle.dumps(np.random.get_state())
    yield "the random state of a GPU", random_state()
    yield "torch's default dtype", torch.get_default_dtype()
    yield "torch's default device", torch.get_default_device()
    yield "torch's gradient mode", torch.is_grad_enabled()
    yield "torch's inference mode", torch.is_inference_mode_enabled()
    yield "torch's autocast", [torch.is_autocast_enabled(kind) for kind in device_kinds()]
    yield "torch's number of threads", torch.get_num_threads()
    yield "torch's deterministic mode", torch.are_deterministic_algorithms_enabled()
    yield "the environment", dict(os.environ)
    yield "the filters of warnings", list(warnings.filters)
    for index, _ in enumerate(_get_current_function_mode_stack()):  # type: ignore[no-untyped-call]
        yield f"a torch function mode ({index})", True
    for index, _ in enumerate(_get_current_dispatch_mode_stack()):
        yield f"a torch dispatch mode ({index})", True
    for kind, key in _hooks_in(vars(modules), "_global_"):
        yield f"a global {kind} ({key})", True


def _hooks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        for kind, key in _hooks_in(vars(module), "_"):
            yield f"a {kind} on {name or 'the model'} ({key})", True
    for name, parameter in model.named_parameters():
        hooks = getattr(parameter, "_backward_hooks", None) or {}
        later = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
        for key in [*hooks, *later]:
            yield f"a hook on the parameter {name} ({key})", True


def _hooks_in(attributes: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Every hook, with its kind in the words of torch: ``forward hook``."""
    for attribute, hooks in attributes.items():
        if attribute.startswith(prefix) and attribute.endswith("_hooks"):
            kind = attribute.removeprefix(prefix).removesuffix("s").replace("_", " ")
            yield from ((kind, key) for key in hooks or ())


def _modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes of all modules, with their values if they are plain."""
    for name, module in model.named_modules():
        owner = name or "the model"
        yield f"the training mode of {owner}", module.training
        for attribute, value in vars(module).items():
            if attribute not in _CHECKED_ELSEWHERE and not attribute.startswith("__"):
                yield f"the attribute {attribute} of {owner}", _compared(value)
    config = getattr(model, "config", None)
    for attribute, value in (vars(config) if config is not None else {}).items():
        compared = value if isinstance(value, (*_PLAIN, type(None))) else str(value)
        yield f"{attribute} of the model's configuration", compared


def _compared(value: Any) -> Any:
    """The value of an attribute for comparison; a tensor equals None, since it may be a state."""
    if value is None or isinstance(value, Tensor):
        return "a state"
    return value if isinstance(value, _PLAIN) else type(value)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield f"the parameter {name}", (parameter.data_ptr(), parameter.dtype, parameter.shape)
        yield f"the values of {name}", None if parameter.is_inference() else parameter._version
        yield f"requires_grad of {name}", parameter.requires_grad
        yield f"the gradient of {name}", parameter.grad is None
    for name, buffer in model.named_buffers():
        yield f"the buffer {name}", buffer.clone()


def _code(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Functions that an adapter may have replaced."""
    for module in (sys.modules[type(model).__module__], torch.nn.functional):
        for name, value in vars(module).items():
            if callable(value):
                yield f"{name} of {module.__name__}", id(value)
    for owner in (type(model), Tensor):
        for name, value in vars(owner).items():
            if callable(value) and not name.startswith("_"):
                yield f"{owner.__name__}.{name}", id(value)
