"""Mixtures of experts built like LLaMA: Qwen2-MoE, Mixtral and OLMoE."""

from dataclasses import replace
from typing import Any

from torch import nn

from apt.adapter import (
    DecoderAdapter,
    Experts,
    Groups,
    Input,
    Permutable,
    Site,
    attention_heads,
    attention_values,
    mlp_channels,
)

_ATTENTION = (
    Input("attention", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Input("heads", ("self_attn.o_proj",), residual=True),
)
_DENSE = (
    Input("mlp", ("mlp.gate_proj", "mlp.up_proj")),
    Input("neurons", ("mlp.down_proj",), residual=True),
)
# The output of the shared expert is multiplied by a gate before it is added to the stream.
_SHARED = (
    Input("shared", ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")),
    Input("shared neurons", ("mlp.shared_expert.down_proj",)),
)


class MixtureAdapter(DecoderAdapter):
    """Attention, then routed experts with or without a shared one, or in some blocks an MLP.

    The gate of the shared expert stays dense.
    """

    blocks_path = "model.layers"
    left_dense = ("mlp.shared_expert_gate",)
    experts = (
        Experts("mlp.experts", router="mlp.gate"),
        # Mixtral in transformers 4.
        Experts(
            "block_sparse_moe.experts",
            router="block_sparse_moe.gate",
            linears=(("w1", "w3"), ("w2",)),
        ),
    )

    def inputs_of(self, block: nn.Module) -> tuple[Input, ...]:
        """The inputs of a block of its kind: with experts, with a shared one too, or an MLP."""
        if not self.experts_of(block):
            return _ATTENTION + _DENSE
        shared = hasattr(getattr(block, "mlp", None), "shared_expert")
        return _ATTENTION + _SHARED if shared else _ATTENTION

    def sites(self, block: nn.Module) -> list[Site]:
        """The Linears and the experts, in the order of the installed transformers."""
        sites = super().sites(block)
        names = {entry.name for entry in _SHARED}
        shared = [site for site in sites if site.input in names]
        if not (shared and isinstance(block.get_submodule("mlp.experts"), nn.ModuleList)):
            return sites
        # transformers 4 multiplies the shared expert after the others.
        return [
            *(site for site in sites if not (site.routed or site.input in names)),
            *(replace(site, order=site.order - len(_SHARED)) for site in sites if site.routed),
            *(replace(site, order=site.order + len(_SHARED)) for site in shared),
        ]

    def groups(self, block: nn.Module, config: Any) -> list[Groups]:
        """The heads of the attention, and the experts or the channels of the MLP.

        Two kinds of heads are left out: the heads of OLMoE, which normalises all heads together,
        and the heads of Qwen2-MoE in transformers 4, where the configuration has no size of heads.
        """
        groups = super().groups(block, config)
        if not self.experts_of(block):
            groups.append(mlp_channels(block, config))
        if not (hasattr(block.self_attn, "q_norm") or hasattr(block.self_attn, "hidden_size")):
            groups += attention_heads(block, config)
        return groups

    def permutable(self, block: nn.Module, config: Any) -> list[Permutable]:
        """The channels of a dense block, and the values of each key/value head."""
        return [*super().permutable(block, config), attention_values(block, config)]
