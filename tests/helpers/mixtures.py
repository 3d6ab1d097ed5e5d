"""Tiny random mixtures of experts."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 40, "moe_intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    "num_experts_per_tok": 2,
}  # fmt: skip
_TYPES = {
    "qwen2_moe": {"num_experts": 8, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"num_experts": 8, "norm_topk_prob": True},
    "deepseek_v3": {
        "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8,
        "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4,
    },
    "gpt_oss": {"num_local_experts": 8},
    "mixtral": {"num_local_experts": 8, "intermediate_size": 24},
    "llama": {},  # dense
    "llama4_text": {"num_local_experts": 8, "intermediate_size_mlp": 24, "num_experts_per_tok": 1},
}  # fmt: skip


def mixture(model_type, **changed):
    """A random model of 8 experts; the test is skipped if transformers lacks its family."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip("this transformers has no such family")
    torch.manual_seed(0)
    sizes = {**_SIZES, **_TYPES[model_type], **changed}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.ndim > 1:
            torch.nn.init.normal_(tensor, std=0.3)
        elif "bias" in name:
            torch.nn.init.normal_(tensor)
    return model.eval()


def experts_of(block):
    """The name and the module of the experts of a block; None if it has none."""
    return next(
        ((n, m) for n, m in block.named_modules() if hasattr(m, "down_proj") and "experts" in n
         and isinstance(m.down_proj, torch.nn.Parameter)), None,
    )  # fmt: skip
