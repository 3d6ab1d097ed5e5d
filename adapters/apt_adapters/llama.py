"""LLaMA: attention with shared or separate key/value heads, and a gated MLP."""

from typing import Any

from torch import nn

from apt.adapter import (
    DecoderAdapter,
    Groups,
    Input,
    Permutable,
    attention_heads,
    attention_values,
    mlp_channels,
)


class LlamaAdapter(DecoderAdapter):
    """``LlamaForCausalLM`` and models with the same modules."""

    blocks_path = "model.layers"
    inputs = (
        Input("attention", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Input("heads", ("self_attn.o_proj",), residual=True),
        Input("mlp", ("mlp.gate_proj", "mlp.up_proj")),
        Input("neurons", ("mlp.down_proj",), residual=True),
    )

    def groups(self, block: nn.Module, config: Any) -> list[Groups]:
        """The channels of the MLP, and the heads of the attention.

        There are none inside a larger model, such as a model with a tower for images, which has
        another kind of configuration.
        """
        if not hasattr(config, "num_key_value_heads"):
            return []
        return [mlp_channels(block, config), *attention_heads(block, config)]

    def permutable(self, block: nn.Module, config: Any) -> list[Permutable]:
        """The channels, and the values of each key/value head; none inside a larger model."""
        if not hasattr(config, "num_key_value_heads"):
            return []
        return [*super().permutable(block, config), attention_values(block, config)]
