"""Zeros that stay while a program trains a pruned model with tools that know nothing of them."""

import weakref
from typing import Any, Self

import torch
from torch import nn
from transformers import TrainerCallback

from apt.adapter import Adapter
from apt.adapter.wrapped import check_in_memory
from apt.arguments import checked
from apt.checkpoints.masks import masks_of
from apt.engine.given import find_adapter
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
        optimizer: the optimizer. AdamW and SGD leave a weight at zero that has no gradient, also
            with weight decay; others may not, and need this argument.
        adapter: the name of an adapter, or an adapter; by default the one that serves the model's
            type.

    Returns:
        The zeros; ``remove()``, or the end of a ``with`` statement, lets them be trained again.

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

    At the end of the training the model is as any other. The Trainer tells no callback of an
    exception. After one, the zeros are let go by `remove`, at the end of a ``with`` statement, at
    the beginning of another training with this callback, or with the callback.

    Args:
        adapter: as in `keep_zeros`.
    """

    def __init__(self, adapter: str | Adapter | None = None) -> None:
        self._adapter = adapter
        self._kept: KeptZeros | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Let the weights be trained from now on."""
        if self._kept is not None:
            self._kept.remove()
            self._kept = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Note the zeros of the model."""
        self.remove()
        self._kept = keep_zeros(given["model"], adapter=self._adapter)
        weakref.finalize(self, self._kept.remove)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set them to zero again, whatever the optimizer did."""
        if self._kept is not None:
            self._kept.restore()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the model as any other."""
        self.remove()
