"""Small random models of the families without an embedded checkpoint, for ``apt-prune check``."""

from typing import Any

_SMALL = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def jamba(**options: Any) -> Any:
    """A Jamba model: blocks of Mamba and of attention, each kind with an MLP and with experts."""
    from transformers import JambaConfig, JambaForCausalLM

    config = JambaConfig(**{
        **_SMALL, "attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 2,
        "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2,
        "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False, **options,
    })  # fmt: skip
    return JambaForCausalLM(config)


def falcon_h1(**options: Any) -> Any:
    """A Falcon-H1 model with both kinds of heads, and with multipliers other than 1."""
    from transformers import FalconH1Config, FalconH1ForCausalLM

    config = FalconH1Config(**{
        **_SMALL, "head_dim": 8, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16,
        "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 8,
        "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.5, "attention_in_multiplier": 0.75,
        "attention_out_multiplier": 0.5, **options,
    })  # fmt: skip
    return FalconH1ForCausalLM(config)
