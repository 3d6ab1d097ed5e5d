"""Zeros that stay while a program trains a pruned model with other tools."""

import weakref
from typing import Any, Self

import torch
from torch import nn
from transformers import TrainerCallback

from apt.adapter import Adapter
from apt.adapter.wrapped import check_in_memory
from apt.arguments import checked
from apt.checkpoints.masks import masks_of
from apt.engine.caller_model import find_adapter
from apt.errors import AptError
from apt.plugin.registry import registry
from apt.recovery.kept_zeros import KeptZeros


@checked
def keep_zeros(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    adapter: str | Adapter | None = None,
) -> KeptZeros:
    """Keep every zero of a pruned model while other code trains it.

    Args:
        model: the pruned model, a causal language model of transformers.
        optimizer: the optimizer. AdamW and SGD keep a weight without a gradient at zero, also with
            weight decay. Other optimizers may not, and need this argument.
        adapter: the name of an adapter, or an adapter; by default the one that serves the model's
            type.

    Returns:
        The zeros. ``remove()``, or the end of a ``with`` statement, lets other code change them.

    Raises:
        AptError: the model has no zeros, or no adapter serves it.
    """
    check_in_memory(model)
    masks = masks_of(model, find_adapter(adapter, model, registry())[1])
    if not masks:
        raise AptError("the model has no zeros", "prune it first")
    return KeptZeros({model.get_parameter(name): m for name, m in masks.items()}, optimizer)


class KeepZeros(TrainerCallback):  # type: ignore[misc]
    """`keep_zeros` as a callback of transformers' Trainer, and of trainers made from it.

    At the end of the training the zeros are free again. The Trainer does not report an exception to
    its callbacks. After an exception, the zeros are freed by `remove`, at the end of a ``with``
    statement, by another training with this callback, or when the callback is deleted.

    Args:
        adapter: as in `keep_zeros`.
    """

    def __init__(self, adapter: str | Adapter | None = None) -> None:
        self._adapter = adapter
        self._zeros: KeptZeros | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Free the zeros: other code may change them."""
        if self._zeros is not None:
            self._zeros.remove()
            self._zeros = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **arguments: Any) -> None:
        """Keep the zeros of the model from now on."""
        self.remove()
        self._zeros = keep_zeros(arguments["model"], adapter=self._adapter)
        weakref.finalize(self, self._zeros.remove)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restore the zeros that the optimizer has changed."""
        if self._zeros is not None:
            self._zeros.restore()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Free the zeros."""
        self.remove()
