"""BLOOM: fused query_key_value, ALiBi, and blocks that return tuples."""

from dataclasses import replace
from typing import Any

from torch import nn

from apt.adapter import DecoderAdapter, Input, Site
from apt.errors import AptError


class BloomAdapter(DecoderAdapter):
    """``BloomForCausalLM``."""

    blocks_path = "transformer.h"
    inputs = (
        Input("attention", ("self_attention.query_key_value",)),
        Input("heads", ("self_attention.dense",), residual=True),
        Input("mlp", ("mlp.dense_h_to_4h",)),
        Input("neurons", ("mlp.dense_4h_to_h",), residual=True),
    )

    def check(self, config: Any) -> None:
        """Refuse the mode that multiplies by slices of a weight, where no input is complete."""
        if getattr(config, "slow_but_exact", False) and config.pretraining_tp > 1:
            raise AptError(
                "this BLOOM config has slow_but_exact with pretraining_tp > 1",
                "set slow_but_exact to false in its config.json; results agree except for rounding",
            )

    def positions(self, config: Any) -> int | None:
        """The sequence length of the training, if the configuration has it; ALiBi has no limit."""
        return getattr(config, "seq_length", None)

    def held(self, config: Any, seqlen: int) -> int:
        """Three attention matrices per head: scores, scores with the mask, and probabilities."""
        return 3 * super().held(config, seqlen)

    def sites(self, block: nn.Module) -> list[Site]:
        """As declared; not residual if the residual connection starts after the layer norm."""
        sites = super().sites(block)
        if block.apply_residual_connection_post_layernorm:
            return [replace(site, residual=False) for site in sites]
        return sites
