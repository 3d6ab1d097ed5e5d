"""Zeros of a pruned model that stay zero while other code trains the model."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class KeptZeros:
    """Weights that stay zero until `remove` is called.

    Their gradients are zero, so that neither clipping nor the moments of an optimizer depend on
    them. A frozen parameter keeps its zeros too if it is trained later. In a ``with`` statement
    `remove` is called at the end, also after an exception.

    Args:
        masks: the masks (True where a weight stays zero), by parameter.
        optimizer: the optimizer. After each of its steps the weights are set to zero again, for
            optimizers that also move weights without a gradient. None for no such hook.
    """

    def __init__(
        self, masks: Mapping[nn.Parameter, Tensor], optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self._masks = masks
        self._handles = [
            _register_hook(parameter, partial(Tensor.masked_fill, mask=mask, value=0))
            for parameter, mask in masks.items()
        ]
        if optimizer is not None:
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self.restore()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @torch.no_grad()
    def restore(self) -> None:
        """Set the weights to zero again."""
        for parameter, mask in self._masks.items():
            parameter.masked_fill_(mask, 0)

    def remove(self) -> None:
        """Remove all hooks: the weights can then be trained."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _register_hook(parameter: nn.Parameter, hook: Callable[..., Any]) -> RemovableHandle:
    """Register a hook on the gradient of a parameter, which may be frozen."""
    required = parameter.requires_grad
    parameter.requires_grad_(True)  # for `register_hook`; the hook stays afterwards
    handle: RemovableHandle = parameter.register_hook(hook)  # type: ignore[no-untyped-call]
    parameter.requires_grad_(required)
    return handle
