"""LoRA whose update is masked, so that a merge keeps the zeros of a pruned model.

It is peft's LoRA with another linear layer: the update ``s · B A`` is zero where the weight is
zero, in training and in the merge. Adapters are saved in the format of LoRA, and must be opened
with `masked_lora` again: plain LoRA would fill the zeros.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn

_UNSUPPORTED = ("lora_dropout", "use_dora", "lora_bias")  # their update is not a masked matrix


class MaskedLoraLinear(Linear):  # type: ignore[misc]
    """peft's LoRA of a `torch.nn.Linear`, with a masked update."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update (out, in) of an adapter, zero where the weight is zero."""
        weight = self.get_base_layer().weight
        with torch.autocast(weight.device.type, enabled=False):  # as precise as in a merge
            update: Tensor = super().get_delta_weight(adapter)
        kept: Tensor = weight.detach() != 0
        return update * kept.to(update.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer with the masked updates of the active adapters."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        linear, weight = self.get_base_layer(), self.get_base_layer().weight
        for name in self.active_adapters:
            if name in self.lora_A:
                weight = weight + self.get_delta_weight(name).to(weight.dtype)
        return F.linear(x, weight.to(x.dtype), linear.bias)


def masked_lora(**options: Any) -> LoraConfig:
    """A configuration of LoRA with masked updates.

    Args:
        **options: the arguments of `peft.LoraConfig`, except dropout, DoRA and biases.

    Raises:
        ValueError: the update of an option cannot be masked. peft raises the same error for a
            target that is not a `torch.nn.Linear`.
    """
    if unsupported := [name for name in _UNSUPPORTED if options.get(name)]:
        raise ValueError(f"masked LoRA does not serve {', '.join(unsupported)}")
    config = LoraConfig(**options)
    config._register_custom_module({nn.Linear: MaskedLoraLinear, nn.Module: _refuse})
    return config


def _refuse(target: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Raise an error instead of peft's other layers, whose updates are not masked."""
    raise ValueError(f"masked LoRA serves torch.nn.Linear, not {type(target).__name__}")
