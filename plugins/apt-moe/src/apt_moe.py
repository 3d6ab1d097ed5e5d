"""Qwen3-MoE: stacked experts, each pruned on the tokens that the router sends to it."""

from typing import Any

from torch import nn

from apt.adapter import (
    Call,
    DecoderAdapter,
    Groups,
    Input,
    Site,
    State,
    expert_groups,
    expert_sites,
    one_by_one,
)
from apt.hookspecs import AdapterSpec, hookimpl

APT_API = 1

_ATTENTION = (
    Input("attention", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Input("heads", ("self_attn.o_proj",), residual=True),
)
_STACKED = ("gate_up_proj", "down_proj")
_DENSE = (
    Input("mlp", ("mlp.gate_proj", "mlp.up_proj")),
    Input("neurons", ("mlp.down_proj",), residual=True),
)


class Qwen3MoeAdapter(DecoderAdapter):
    """``Qwen3MoeForCausalLM``. The router is left dense."""

    blocks_path = "model.layers"
    left_dense = ("mlp.gate",)

    def inputs_of(self, block: nn.Module) -> tuple[Input, ...]:
        """The inputs of a block with experts or with a plain MLP."""
        return _ATTENTION if _experts(block) else _ATTENTION + _DENSE

    def sites(self, block: nn.Module) -> list[Site]:
        """The Linears, and two sites for each expert."""
        sites, experts = super().sites(block), _experts(block)
        if experts is not None:
            sites += expert_sites("mlp.experts", experts.num_experts, _STACKED, order=2)
        return sites

    def groups(self, block: nn.Module, config: Any) -> list[Groups]:
        """The experts of a block with experts; none in another block."""
        if _experts(block) is None:
            return []
        count, least = config.num_experts, config.num_experts_per_tok
        return [
            expert_groups("mlp.experts", "mlp.gate.weight", count, _STACKED, "num_experts", least)
        ]

    def step(self, block: nn.Module, state: State, call: Call) -> State:
        """Run the block, one expert at a time."""
        with one_by_one(_experts(block)):
            return super().step(block, state, call)


def _experts(block: nn.Module) -> Any:
    """The experts; None if the block has a plain MLP, or is one of another family."""
    return getattr(getattr(block, "mlp", None), "experts", None)


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
