"""LLaMA: attention with shared or separate key/value heads, and a gated MLP."""

from apt.adapter import DecoderAdapter, Input


class LlamaAdapter(DecoderAdapter):
    """``LlamaForCausalLM`` and models with the same modules."""

    blocks_path = "model.layers"
    inputs = (
        Input("attention", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Input("heads", ("self_attn.o_proj",), residual=True),
        Input("mlp", ("mlp.gate_proj", "mlp.up_proj")),
        Input("neurons", ("mlp.down_proj",), residual=True),
    )
