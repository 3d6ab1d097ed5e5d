"""Detection of changes in the parts of a module, and of hooks and modes that observe them."""

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules_of_torch
from torch.utils._device import DeviceContext

try:
    from transformers.utils import output_capturing
except ImportError:  # transformers 4 replaces methods while it captures
    output_capturing = None

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TABLES = ("_parameters", "_buffers", "_modules", *_HOOKS)
_IGNORED = vars(nn.Module()).keys() - {"training", *_TABLES}  # torch's attributes without effect
_CALL = nn.Module.__call__
_GLOBAL_HOOKS = [
    vars(modules_of_torch)[f"_global{name}"] for name in _HOOKS
]  # hooks on all modules
_COMPARISON_ERRORS = (RuntimeError, KeyError, TypeError, ValueError)
"""The errors of comparisons of arrays and tensors, and of missing attributes."""


class Watched:
    """The attributes, tensors and hooks of all modules inside another module.

    A change of a class, an attribute, a tensor or the memory of a parameter is detected. A change
    of the values of a tensor is not.

    Args:
        outer: the enclosing module, whose own attributes may change.
        others: further tables to watch.
    """

    def __init__(self, outer: nn.Module, *more_tables: Mapping[str, Any]) -> None:
        inner = [module for module in outer.modules() if module is not outer]
        tables = [outer._modules, *more_tables, *(vars(m)[name] for m in inner for name in _TABLES)]
        self._filled = [table for table in tables if table]
        self._empty = [table for table in tables if not table]
        self._entries = [dict(table) for table in self._filled]
        self._modules, self._classes = inner, [type(module) for module in inner]
        # A getter is faster than a comparison of all attributes that torch sets in a module.
        self._attribute_tables = [vars(module) for module in inner]
        self._getters = [(_getter(module), vars(module)) for module in inner]
        self._counts = [*map(len, self._attribute_tables)]
        self._attributes = [get(attributes) for get, attributes in self._getters]
        self._tensors = [t for m in inner for t in m._parameters.values() if t is not None]
        self._addresses = [_address(tensor) for tensor in self._tensors]

    def is_current(self) -> bool:
        """True if nothing has changed."""
        try:
            return (
                not any(self._empty)
                and [*map(type, self._modules)] == self._classes
                and self._filled == self._entries
                and [*map(len, self._attribute_tables)] == self._counts
                and [get(attributes) for get, attributes in self._getters] == self._attributes
                and [tensor.data_ptr() for tensor in self._tensors] == self._addresses
            )
        except _COMPARISON_ERRORS:
            return False

    def need_gradients(self) -> bool:
        """True if products with the parameters are recorded for a backward pass."""
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self._tensors)


def same(table: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """True if two tables have the same or equal objects."""
    try:
        return table == other
    except _COMPARISON_ERRORS:
        return False


def _getter(module: nn.Module) -> Callable[[Mapping[str, Any]], Any]:
    """A function that reads the attributes of a module that have an effect on its results."""
    return itemgetter(*(name for name in vars(module) if name not in _IGNORED))


def _address(tensor: Tensor) -> int:
    """The address of a tensor in memory; 0 if it has no memory."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def runs_itself(module: nn.Module) -> bool:
    """True if a call of a module runs the method ``forward`` of its class."""
    forward = vars(module).get("forward")
    replaced = (
        forward is not None and getattr(forward, "__func__", None) is not type(module).forward
    )
    return not replaced and getattr(module, "_compiled_call_impl", None) is None


def hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    """All hooks on the calls of a module."""
    return [hook for name in _HOOKS for hook in vars(module)[name].values()]


def only_captures(hook: Callable[..., Any]) -> bool:
    """True for a hook of transformers that captures outputs on request.

    Such hooks stay after the first call with ``output_hidden_states=True``.
    """
    module = getattr(hook, "__module__", "")
    return output_capturing is not None and module == output_capturing.__name__


def is_capturing() -> bool:
    """True if transformers captures outputs in the present call of a model."""
    return output_capturing is not None and bool(output_capturing._active_collector.get())


def is_plain() -> bool:
    """True if operations run without any observer or transformation.

    False within transforms of `torch.func` and forward-mode derivatives, autocast, tracing, modes
    that observe each operation, and while global module hooks are registered.
    """
    return not (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or (torch._C._len_torch_function_stack() and not _only_devices())
        or any(_GLOBAL_HOOKS)
        or nn.Module.__call__ is not _CALL
        or torch.compiler.is_compiling()
    )


def _only_devices() -> bool:
    """True if the active modes only choose the device of new tensors."""
    count = torch._C._len_torch_function_stack()
    modes = [torch._C._get_function_stack_at(place) for place in range(count)]
    return all(type(mode) is DeviceContext for mode in modes)
