"""Hybrids of attention and state-space mixers: Jamba and Falcon-H1."""

from typing import Any

from torch import nn

from apt.adapter import Call, Groups, Input, Site, State, expert_groups, expert_sites, one_by_one
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
_STACKED = ("gate_up_proj", "down_proj")
_MLP = (
    Input("mlp", ("feed_forward.gate_proj", "feed_forward.up_proj")),
    Input("neurons", ("feed_forward.down_proj",), residual=True),
)


class JambaAdapter(StateSpaceAdapter):
    """``JambaForCausalLM``: blocks of attention or of Mamba, with an MLP or routed experts.

    The router stays dense.
    """

    blocks_path = "model.layers"
    mixer = "mamba"
    left_dense = ("feed_forward.router",)

    def positions(self, config: object) -> None:
        """No limit: the model has no position embeddings."""

    def inputs_of(self, block: nn.Module) -> tuple[Input, ...]:
        """The inputs of a block of its kind: attention or Mamba, with an MLP or experts."""
        inputs = _MIXER if hasattr(block, "mamba") else _ATTENTION
        return inputs if _experts(block) else inputs + _MLP

    def sites(self, block: nn.Module) -> list[Site]:
        """The Linears, and two slices of stacked parameters for each expert."""
        sites, experts = super().sites(block), _experts(block)
        if experts is not None:
            order = len(self.inputs_of(block))
            count = experts.get_parameter("down_proj").shape[0]
            sites += expert_sites("feed_forward.experts", count, _STACKED, order)
        return sites

    def groups(self, block: nn.Module, config: Any) -> list[Groups]:
        """The experts of a block with experts; none in another block."""
        experts = _experts(block)
        if experts is None:
            return []
        return [
            expert_groups(
                "feed_forward.experts",
                "feed_forward.router.weight",
                config.num_experts,
                _STACKED,
                "num_experts",
                config.num_experts_per_tok,
            )
        ]

    def step(self, block: nn.Module, state: State, call: Call) -> State:
        """Run the block, with its experts one by one."""
        with one_by_one(_experts(block)):
            return super().step(block, state, call)


def _experts(block: nn.Module) -> nn.Module | None:
    return getattr(getattr(block, "feed_forward", None), "experts", None)


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
