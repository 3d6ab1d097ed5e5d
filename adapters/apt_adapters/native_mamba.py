"""Models of the package mamba_ssm: ``MambaLMHeadModel`` of Mamba 1 and 2, with MLPs and attention.

A block receives the residual stream in two parts, adds them first, and returns two parts. In this
adapter the state is the sum of the two parts. A block receives the state and zeros as the other
part; the sum is bit-identical.
"""

from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Call, DecoderAdapter, Input, ModelInputs, State
from apt.errors import AptError

_MAMBA = (
    Input("mixer", ("mixer.in_proj",)),
    Input("convolved", ("mixer.x_proj",)),
    Input("time_step", ("mixer.dt_proj",)),
    Input("scanned", ("mixer.out_proj",), residual=True),
)
_MAMBA2_OR_ATTENTION = (
    Input("mixer", ("mixer.in_proj",)),
    Input("scanned", ("mixer.out_proj",), residual=True),
)
_MLP = (Input("mlp", ("mlp.fc1",)), Input("neurons", ("mlp.fc2",), residual=True))


class NativeMambaAdapter(DecoderAdapter):
    """``MambaLMHeadModel`` of mamba_ssm."""

    blocks_path = "backbone.layers"
    left_dense = ("mixer.conv1d", "mixer.A_log")

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The layers; models of transformers, whose layers differ, are refused."""
        if not hasattr(model, "allocate_inference_cache"):
            raise AptError(
                f"adapter NativeMambaAdapter does not fit {type(model).__name__}: it is not a "
                "model of mamba_ssm",
                "choose the model's own adapter, see: apt-prune adapters",
            )
        return super().blocks(model)

    def inputs_of(self, block: nn.Module) -> tuple[Input, ...]:
        """The inputs of a block, by its kind of mixer, and with those of the MLP if it has one."""
        mixer: Any = block.mixer
        inputs = _MAMBA if hasattr(mixer, "x_proj") else _MAMBA2_OR_ATTENTION
        return inputs if block.mlp is None else inputs + _MLP

    def enter(self, model: nn.Module, tokens: ModelInputs) -> tuple[State, list[Call]]:
        """The embeddings as the state, and calls without arguments other than the state."""
        backbone: Any = model.get_submodule("backbone")
        with torch.no_grad():
            state = backbone.embedding(tokens)
        if backbone.residual_in_fp32:
            state = state.float()
        return state, [Call() for _ in backbone.layers]

    def step(self, block: nn.Module, state: State, call: Call) -> State:
        """Run a block on the state and zeros in the precision of its weights; add the results."""
        weight: Tensor = block.get_parameter("norm.weight")
        product, residual = block(torch.zeros_like(state, dtype=weight.dtype), state)
        return residual + product
