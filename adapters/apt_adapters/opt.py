"""OPT: separate q, k and v, a plain MLP; 350m normalises after each sublayer."""

from apt.adapter import DecoderAdapter, Input


class OptAdapter(DecoderAdapter):
    """``OPTForCausalLM``. ``project_in`` and ``project_out`` lie outside the blocks: left alone."""

    blocks_path = "model.decoder.layers"
    inputs = (
        Input("attention", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Input("heads", ("self_attn.out_proj",), residual=True),
        Input("mlp", ("fc1",)),
        Input("neurons", ("fc2",), residual=True),
    )
