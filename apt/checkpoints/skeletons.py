"""Models without weights, but with all buffers and tables that their constructors create."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel

from apt.checkpoints.architecture import without_weights
from apt.compute import fp32_names

_SPREAD = 0.02  # the standard deviation of random weights
_RANDOM = 2**22 - 3  # random values; rows of common widths do not repeat them
_LARGE = 2**27  # weights from which values stay zero: only embeddings are this large


def skeleton_module(
    config: Any, dtype: torch.dtype | None = None, *, trust_remote_code: bool
) -> nn.Module:
    """A model in eval mode, with its parameters on the meta device.

    Buffers, such as tables of positions, are on the CPU. At most one parameter at a time is in
    memory, and its pages are never written.

    Args:
        dtype: the dtype of the model; by default the dtype of its configuration. Parameters that
            the class keeps in fp32, such as a router, are in fp32, as transformers loads them.
    """
    config = copy.deepcopy(config)
    if dtype is not None:
        config.dtype = dtype
    with _parameters_on_meta():
        module: Any = without_weights(config, trust_remote_code=trust_remote_code)
    if dtype is not None:
        _keep_fp32(module, dtype)
        _renew_buffers(module, module)
    return cast(nn.Module, module.eval())


def _keep_fp32(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the tensors that the class keeps in fp32 to fp32."""
    tensors = module.state_dict(keep_vars=True)
    for name in fp32_names(module, dtype, tensors):
        if tensors[name].is_floating_point():
            tensors[name].data = tensors[name].data.float()


@torch.no_grad()
def _renew_buffers(module: nn.Module, owner: Any) -> None:
    """Compute the buffers that are not stored anew, as transformers does for a loaded model.

    The constructor has computed the tables of positions in the dtype of the model, with less
    precision.
    """
    for child in module.children():
        _renew_buffers(child, child if isinstance(child, PreTrainedModel) else owner)
    if module._non_persistent_buffers_set:
        owner._init_weights(module)


def skeleton_of_class(model_class: Any, config: Any, model: Any) -> nn.Module:
    """A model of a class, with its parameters on the meta device.

    Args:
        model: the configuration whose implementations of attention and of experts are used.
    """
    parts = {name: getattr(model, name, None) for name in getattr(model, "sub_configs", ())}
    experts_of_part = {
        n: e for n, part in parts.items() if (e := getattr(part, "_experts_implementation", 0))
    }
    implementations = {
        "attn_implementation": getattr(model, "_attn_implementation", None),
        # A tower for images may refuse the implementation that the text part accepts.
        "experts_implementation": experts_of_part
        or getattr(model, "_experts_implementation", None),
    }
    arguments = {name: value for name, value in implementations.items() if value}
    with _parameters_on_meta():
        module: nn.Module = model_class._from_config(config, **arguments)
    return module


def with_random_weights(model: nn.Module, device: str) -> nn.Module:
    """A skeleton with normally distributed weights in memory, for measurements of time.

    The same values are repeated, and no tensor is shared. A very large parameter, as only
    embeddings are, is zero.
    """
    random = torch.randn(_RANDOM, generator=torch.Generator().manual_seed(0)) * _SPREAD
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            count = parameter.numel()
            values = torch.zeros(count, dtype=parameter.dtype, device=device)
            if count < _LARGE:
                for part in torch.split(values, _RANDOM):
                    part.copy_(random[: len(part)])
            setattr(module, name, nn.Parameter(values.view(parameter.shape)))
    return model.to(device)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """While entered, modules that this thread creates have their parameters on the meta device."""
    thread = get_ident()

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if get_ident() != thread or parameter is None or parameter.is_meta:
            return None
        empty = torch.empty_like(parameter, device="meta")
        moved = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        moved._is_hf_initialized = True  # type: ignore[attr-defined]  # no slow random values
        return moved

    handle = register_module_parameter_registration_hook(on_meta)
    try:
        yield
    finally:
        handle.remove()
