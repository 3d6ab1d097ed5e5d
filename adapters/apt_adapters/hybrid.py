"""Hybrids of attention and state-space mixers: Jamba and Falcon-H1."""

from dataclasses import replace
from typing import Any

from torch import nn

from apt.adapter import Experts, Groups, Input, mlp_channels
from apt_adapters.mamba import StateSpaceAdapter

_ATTENTION = (
    Input("attention", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Input("heads", ("self_attn.o_proj",), residual=True),
)
_MIXER = (
    Input("mixer", ("mamba.in_proj",)),
    Input("convolved", ("mamba.x_proj",)),
    Input("time_step", ("mamba.dt_proj",)),
    Input("scanned", ("mamba.out_proj",), residual=True),
)
_MLP = (
    Input("mlp", ("feed_forward.gate_proj", "feed_forward.up_proj")),
    Input("neurons", ("feed_forward.down_proj",), residual=True),
)


class JambaAdapter(StateSpaceAdapter):
    """``JambaForCausalLM``: blocks of attention or of Mamba, with an MLP or routed experts."""

    blocks_path = "model.layers"
    mixer = "mamba"
    experts = (Experts("feed_forward.experts", router="feed_forward.router"),)

    def positions(self, config: object) -> None:
        """No limit: the model has no position embeddings."""

    def inputs_of(self, block: nn.Module) -> tuple[Input, ...]:
        """The inputs of a block of its kind: attention or Mamba, with an MLP or experts."""
        inputs = _MIXER if hasattr(block, "mamba") else _ATTENTION
        return inputs if self.experts_of(block) else inputs + _MLP

    def groups(self, block: nn.Module, config: Any) -> list[Groups]:
        """The experts and their channels; one field counts these and the channels of an MLP."""
        if self.experts_of(block):
            return super().groups(block, config)
        return [replace(mlp_channels(block, config, "feed_forward"), kind="expert-channels")]


class FalconH1Adapter(StateSpaceAdapter):
    """``FalconH1ForCausalLM``: attention and Mamba2 in parallel, then an MLP.

    Products are multiplied by constants before they are added to the residual stream, so no input
    is declared residual.
    """

    blocks_path = "model.layers"
    mixer = "mamba"
    inputs = (
        Input("mixer", ("mamba.in_proj",)),
        Input("scanned", ("mamba.out_proj",)),
        Input("attention", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Input("heads", ("self_attn.o_proj",)),
        Input("mlp", ("feed_forward.gate_proj", "feed_forward.up_proj")),
        Input("neurons", ("feed_forward.down_proj",)),
    )
