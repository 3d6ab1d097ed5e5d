"""The zeros of a pruned model that stay while other code trains it."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn


class KeptZeros:
    """Weights that stay zero until `remove` is called.

    Their gradients are zero, so that neither clipping nor an optimizer's moments see them.

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
            parameter.register_hook(partial(Tensor.masked_fill, mask=mask, value=0))  # type: ignore[no-untyped-call]
            for parameter, mask in masks.items()
            if parameter.requires_grad
        ]
        if optimizer is not None:
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self.restore()))

    @torch.no_grad()
    def restore(self) -> None:
        """Set the weights to zero again."""
        for parameter, mask in self._masks.items():
            parameter.masked_fill_(mask, 0)

    def remove(self) -> None:
        """Let the weights be trained from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
