"""GPT-2: weights stored (in, out), in transformers' ``Conv1D``."""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from apt.adapter import DecoderAdapter, Groups, Input, Part
from apt.hookspecs import AdapterSpec, hookimpl

APT_API = 1


class Gpt2Adapter(DecoderAdapter):
    """``GPT2LMHeadModel``."""

    blocks_path = "transformer.h"
    transposed = (Conv1D,)
    inputs = (
        Input("attention", ("attn.c_attn",)),
        Input("heads", ("attn.c_proj",), residual=True),
        Input("mlp", ("mlp.c_fc",)),
        Input("neurons", ("mlp.c_proj",), residual=True),
    )

    def groups(self, block: nn.Module, config: Any) -> list[Groups]:
        """The channels of the MLP. Heads stay: the width of all heads must be the hidden size."""
        count = block.get_parameter(
            "mlp.c_fc.bias"
        ).numel()  # four times the hidden size by default
        parts = (Part("mlp.c_fc.weight", 1), Part("mlp.c_fc.bias"), Part("mlp.c_proj.weight"))
        return [Groups("channels", count, ("mlp.c_proj",), parts, {"n_inner": int})]


def example() -> Any:
    """A small random GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )


@hookimpl
def apt_adapters() -> list[AdapterSpec]:
    """GPT-2."""
    return [
        AdapterSpec(
            "gpt2", "GPT-2, DistilGPT-2", "apt_gpt2:Gpt2Adapter", model_types=("gpt2",),
            example="apt_gpt2:example",
        )
    ]  # fmt: skip
