"""A model without weights but with everything else that its constructor creates."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel

from apt.checkpoints.architecture import without_weights
from apt.compute import fp32_names


def skeleton_module(
    config: Any, dtype: torch.dtype | None = None, *, trust_remote_code: bool
) -> nn.Module:
    """A causal language model, in eval mode, with its parameters on the meta device.

    Everything else, such as buffers and tables of positions, is on the CPU. At no time is more than
    one parameter in memory, and none of its pages is written.

    Args:
        dtype: the dtype of the model; by default that of its configuration. What its class keeps in
            fp32, such as a router, has that dtype, as in a model that transformers loads.
    """
    config = copy.deepcopy(config)
    if dtype is not None:
        config.dtype = dtype
    with _parameters_on_meta():
        module: Any = without_weights(config, trust_remote_code=trust_remote_code)
    if dtype is not None:
        _keep_fp32(module, dtype)
        _renew_buffers(module, module)
    whole: nn.Module = module.eval()
    return whole


def _keep_fp32(module: nn.Module, dtype: torch.dtype) -> None:
    """Give the tensors fp32 that the class keeps in it."""
    tensors = module.state_dict(keep_vars=True)
    for name in fp32_names(module, dtype, tensors):
        if tensors[name].is_floating_point():
            tensors[name].data = tensors[name].data.float()


@torch.no_grad()
def _renew_buffers(module: nn.Module, owner: Any) -> None:
    """Compute the buffers anew that are not stored, as transformers does for a loaded model.

    In the constructor, tables of positions are computed in the dtype of the model.
    """
    for child in module.children():
        _renew_buffers(child, child if isinstance(child, PreTrainedModel) else owner)
    if module._non_persistent_buffers_set:
        owner._init_weights(module)


def skeleton_of_class(kind: Any, config: Any, like: Any) -> nn.Module:
    """As `skeleton_module`, of a class, with the implementations of ``like``."""
    parts = {name: getattr(like, name, None) for name in getattr(like, "sub_configs", ())}
    own = {n: e for n, part in parts.items() if (e := getattr(part, "_experts_implementation", 0))}
    given = {
        "attn_implementation": getattr(like, "_attn_implementation", None),
        # A tower for images may refuse one that it is given through the whole.
        "experts_implementation": own or getattr(like, "_experts_implementation", None),
    }
    chosen = {name: value for name, value in given.items() if value}
    with _parameters_on_meta():
        module: nn.Module = kind._from_config(config, **chosen)
    return module


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """While entered, modules that this thread creates have their parameters on the meta device."""
    here = get_ident()

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if get_ident() != here or parameter is None or parameter.is_meta:
            return None
        empty = torch.empty_like(parameter, device="meta")
        moved = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        moved._is_hf_initialized = True  # type: ignore[attr-defined]  # random values take longest
        return moved

    handle = register_module_parameter_registration_hook(on_meta)
    try:
        yield
    finally:
        handle.remove()
