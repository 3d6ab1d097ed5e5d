"""A model without weights but with everything else that its constructor creates."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM


def skeleton_module(config: Any, *, trust_remote_code: bool) -> nn.Module:
    """A causal language model, in eval mode, with its parameters on the meta device.

    Everything else, such as buffers and tables of positions, is on the CPU. At no time is more than
    one parameter in memory, and none of its pages is written.
    """
    with _parameters_on_meta():
        module: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    whole: nn.Module = module.eval()
    return whole


def skeleton_of_class(kind: Any, config: Any, like: Any) -> nn.Module:
    """As `skeleton_module`, of a class, with the implementations of ``like``."""
    chosen = {
        name: value
        for name in ("attn_implementation", "experts_implementation")
        if (value := getattr(like, f"_{name}", None))
    }
    with _parameters_on_meta():
        module: nn.Module = kind._from_config(config, **chosen)
    return module


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """While entered, modules that this thread creates have their parameters on the meta device."""
    here = get_ident()

    def moved(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if get_ident() != here or parameter is None or parameter.is_meta:
            return None
        empty = torch.empty_like(parameter, device="meta")
        return nn.Parameter(empty, requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(moved)
    try:
        yield
    finally:
        handle.remove()
