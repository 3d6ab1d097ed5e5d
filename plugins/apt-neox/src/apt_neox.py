"""GPT-NeoX and Pythia: fused query_key_value; attention and MLP in parallel in most models."""

from typing import Any

from torch import nn

from apt.adapter import DecoderAdapter, Groups, Input, columns, rows
from apt.hookspecs import AdapterSpec, hookimpl

APT_API = 1


class NeoxAdapter(DecoderAdapter):
    """``GPTNeoXForCausalLM``, with and without the parallel residual."""

    blocks_path = "gpt_neox.layers"
    inputs = (
        Input("attention", ("attention.query_key_value",)),
        Input("heads", ("attention.dense",), residual=True),
        Input("mlp", ("mlp.dense_h_to_4h",)),
        Input("neurons", ("mlp.dense_4h_to_h",), residual=True),
    )

    def groups(self, block: nn.Module, config: Any) -> list[Groups]:
        """The channels of the MLP. Heads stay: the width of all heads must be the hidden size."""
        parts = (*rows(block, "mlp.dense_h_to_4h"), columns("mlp.dense_4h_to_h"))
        fields = {"intermediate_size": int}
        reader = ("mlp.dense_4h_to_h",)
        return [Groups("channels", config.intermediate_size, reader, parts, fields)]


def example(parallel: bool = True) -> Any:
    """A small random GPT-NeoX."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64, use_parallel_residual=parallel,
        )
    )  # fmt: skip


@hookimpl
def apt_adapters() -> list[AdapterSpec]:
    """GPT-NeoX."""
    return [
        AdapterSpec(
            "neox", "GPT-NeoX, Pythia", "apt_neox:NeoxAdapter", model_types=("gpt_neox",),
            example="apt_neox:example",
        )
    ]  # fmt: skip
