"""OPT: separate q, k and v, a plain MLP; 350m normalises after each sublayer."""

from dataclasses import replace
from typing import Any

from torch import nn

from apt.adapter import (
    DecoderAdapter,
    Groups,
    Input,
    Permutable,
    Site,
    attention_values,
    columns,
    rows,
)


class OptAdapter(DecoderAdapter):
    """``OPTForCausalLM``; ``project_in`` and ``project_out`` are outside the blocks: not pruned."""

    blocks_path = "model.decoder.layers"
    inputs = (
        Input("attention", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Input("heads", ("self_attn.out_proj",), residual=True),
        Input("mlp", ("fc1",)),
        Input("neurons", ("fc2",), residual=True),
    )

    def sites(self, block: nn.Module) -> list[Site]:
        """As declared; in a post-norm block, ``fc2`` is added to a normalised stream."""
        sites = super().sites(block)
        if block.do_layer_norm_before:
            return sites
        return [replace(site, residual=site.residual and site.name != "fc2") for site in sites]

    def groups(self, block: nn.Module, config: Any) -> list[Groups]:
        """The channels of the MLP. Heads stay: the width of all heads must be the hidden size."""
        parts = (*rows(block, "fc1"), columns("fc2"))
        return [Groups("channels", config.ffn_dim, ("fc2",), parts, {"ffn_dim": int})]

    def permutable(self, block: nn.Module, config: Any) -> list[Permutable]:
        """The channels, and the values of each head."""
        values = attention_values(block, config, "self_attn.v_proj", "self_attn.out_proj")
        return [*super().permutable(block, config), values]
