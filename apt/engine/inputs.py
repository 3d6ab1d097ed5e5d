"""Checks of the model and the tokens that a program passes, before any weight changes."""

import torch
from torch import Tensor, nn

from apt.adapter import Adapter
from apt.adapter.recording import eval_mode
from apt.calibration.batches import check_shape
from apt.engine.text import check_vocabulary
from apt.errors import AptError


def check_inputs(model: nn.Module, adapter: Adapter, tokens: Tensor) -> None:
    """Raise `AptError` if the model cannot be changed in place, or cannot run on the tokens."""
    _check_weights(model)
    check_shape(tokens)
    if tokens.dtype not in (torch.int64, torch.int32):
        raise AptError(f"tokens are {tokens.dtype}", "give token ids as torch.int64")
    check_vocabulary(tokens, model, "these tokens")
    _check_length(model, adapter, tokens)


def _check_length(model: nn.Module, adapter: Adapter, tokens: Tensor) -> None:
    """Raise if the model fails beyond its positions, as with a table; rotary ones go on."""
    positions = adapter.positions(getattr(model, "config", None))
    if positions is None or tokens.shape[1] <= positions:
        return
    try:
        with torch.no_grad(), eval_mode(model), adapter.running(model):
            model(tokens[:1].to(next(model.parameters()).device))
    except (IndexError, RuntimeError) as error:
        raise AptError(
            f"samples have {tokens.shape[1]} tokens, and the model has {positions} positions",
            "give shorter samples",
        ) from error


def _check_weights(model: nn.Module) -> None:
    """Raise if a parameter has no values, or values that cannot be written or differentiated."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise AptError(f"{name} has no values in memory", "load the whole model into memory")
        if parameter.is_inference():
            raise AptError(
                f"{name} is an inference tensor, which cannot be tuned",
                "load the model outside of torch.inference_mode",
            )
