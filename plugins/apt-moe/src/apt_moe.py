"""Qwen3-MoE: stacked experts, each pruned on the tokens that the router sends to it."""

from typing import Any

from torch import nn

from apt.adapter import DecoderAdapter, Experts, Input
from apt.hookspecs import AdapterSpec, hookimpl

APT_API = 1

_ATTENTION = (
    Input("attention", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Input("heads", ("self_attn.o_proj",), residual=True),
)
_DENSE = (
    Input("mlp", ("mlp.gate_proj", "mlp.up_proj")),
    Input("neurons", ("mlp.down_proj",), residual=True),
)


class Qwen3MoeAdapter(DecoderAdapter):
    """``Qwen3MoeForCausalLM``. The router is left dense."""

    blocks_path = "model.layers"
    experts = (Experts("mlp.experts", router="mlp.gate"),)

    def inputs_of(self, block: nn.Module) -> tuple[Input, ...]:
        """The inputs of a block with experts or with a plain MLP."""
        return _ATTENTION if self.experts_of(block) else _ATTENTION + _DENSE


def example(**options: Any) -> Any:
    """A small random Qwen3-MoE whose second block has a plain MLP."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(**{
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1],
        "max_position_embeddings": 64, **options,
    })  # fmt: skip
    return Qwen3MoeForCausalLM._from_config(config, experts_implementation="eager")


@hookimpl
def apt_adapters() -> list[AdapterSpec]:
    """Qwen3-MoE."""
    return [
        AdapterSpec(
            "qwen3-moe", "Qwen3-MoE, every expert on its own tokens", "apt_moe:Qwen3MoeAdapter",
            model_types=("qwen3_moe",), example="apt_moe:example",
        )
    ]  # fmt: skip
