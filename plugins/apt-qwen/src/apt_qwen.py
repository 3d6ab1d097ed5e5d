"""Qwen2 and Qwen3: LLaMA's modules, with biases on q, k and v or with norms on q and k."""

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
from apt.hookspecs import AdapterSpec, hookimpl

APT_API = 1


class QwenAdapter(DecoderAdapter):
    """``Qwen2ForCausalLM`` and ``Qwen3ForCausalLM``."""

    blocks_path = "model.layers"
    inputs = (
        Input("attention", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Input("heads", ("self_attn.o_proj",), residual=True),
        Input("mlp", ("mlp.gate_proj", "mlp.up_proj")),
        Input("neurons", ("mlp.down_proj",), residual=True),
    )

    def groups(self, block: nn.Module, config: Any) -> list[Groups]:
        """The channels of the MLP, and the heads of the attention."""
        return [mlp_channels(block, config), *attention_heads(block, config)]

    def permutable(self, block: nn.Module, config: Any) -> list[Permutable]:
        """The channels, and the values of each key/value head."""
        return [*super().permutable(block, config), attention_values(block, config)]


def example() -> Any:
    """A small random Qwen3."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        )
    )  # fmt: skip


@hookimpl
def apt_adapters() -> list[AdapterSpec]:
    """Qwen2 and Qwen3."""
    return [
        AdapterSpec(
            "qwen", "Qwen2 and Qwen3, dense", "apt_qwen:QwenAdapter",
            model_types=("qwen2", "qwen3"), example="apt_qwen:example",
        )
    ]  # fmt: skip
