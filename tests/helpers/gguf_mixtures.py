"""Tiny random mixtures of experts as GGUF files, written as llama.cpp's converter writes them."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.helpers.gguf_files import finish, permuted, write_tokenizer

TOKENS = 300
MLA = {"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "kv_lora_rank": 64,
       "num_key_value_heads": 4, "first_k_dense_replace": 1}  # fmt: skip
MODELS = {
    "qwen2moe": ("qwen2_moe", {"num_experts": 8, "shared_expert_intermediate_size": 2}),
    "qwen3moe": ("qwen3_moe", {"num_experts": 8, "norm_topk_prob": True}),
    "deepseek2": ("deepseek_v3", {
        "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
        "q_lora_rank": 64, "routed_scaling_factor": 1.5, **MLA,
    }),
    "deepseek2-v2": ("deepseek_v2", {
        "n_routed_experts": 8, "n_shared_experts": 2, "q_lora_rank": None, **MLA
    }),
    "gpt-oss": ("gpt_oss", {"num_local_experts": 8, "sliding_window": 8}),
    "olmoe": ("olmoe", {"num_experts": 8, "num_key_value_heads": 4}),
    "granitemoe": ("granitemoe", {
        "num_local_experts": 8, "attention_multiplier": 0.1, "embedding_multiplier": 2.0,
        "residual_multiplier": 0.7, "logits_scaling": 0.5,
    }),
    "granitemoe-shared": ("granitemoeshared", {
        "num_local_experts": 8, "attention_multiplier": 0.1, "shared_intermediate_size": 2,
    }),
    "llama4": ("llama4_text", {"num_local_experts": 8, "num_experts_per_tok": 1}),
    "llama": ("mixtral", {"num_local_experts": 8}),
    "llama-dense": ("llama", {}),
}  # fmt: skip
"""Types in transformers and fields by the name of a case: the architecture, and a variant."""


def architecture_of(case):
    return case if case == "gpt-oss" else case.partition("-")[0]


def random_mixture(case, size=64, blocks=4, **changed):
    """A random model; sizes are multiples of ``size``."""
    model_type, fields = MODELS[case]
    if model_type not in CONFIG_MAPPING:
        pytest.skip("this transformers has no such family")
    sizes = {
        "vocab_size": TOKENS, "hidden_size": size, "intermediate_size": size,
        "num_hidden_layers": blocks, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0,
        "pad_token_id": None, "num_experts_per_tok": 2, "moe_intermediate_size": size,
        "intermediate_size_mlp": size, "head_dim": size // 4,
        "rope_scaling": {"rope_type": "default"}, "rope_theta": 10_000.0,
        "router_aux_loss_coef": 0.0,
    } | fields | changed  # fmt: skip
    for name in ("shared_expert_intermediate_size", "shared_intermediate_size"):
        if name in sizes:
            sizes[name] *= size
    if model_type in ("olmoe", "llama"):
        sizes.pop("num_experts_per_tok" if model_type == "llama" else "moe_intermediate_size")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.ndim > 1:  # wide gaps between the scores of experts survive rounded inputs
            routes = "router" in name or name.endswith("mlp.gate.weight")
            torch.nn.init.normal_(tensor, std=(6 if routes else 1.5) * size**-0.5)
        elif "bias" in name or "sinks" in name:
            torch.nn.init.normal_(tensor, std=0.3)
        elif "norm" in name:
            torch.nn.init.normal_(tensor, mean=1, std=0.2)
    return model.float().eval()


def tensors_of(model, architecture):
    """The tensors of a file in fp32, by name, in the order of the parameters."""
    config, found = model.config, {}
    kind = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    transposed = config.model_type in ("gpt_oss", "llama4_text")
    for name, tensor in model.state_dict().items():
        value, block = tensor.float(), f"blk.{name.split('.')[2]}." if ".layers." in name else ""
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith(("gate_up_proj", "gate_up_proj_bias")):
            suffix = "bias" if name.endswith("bias") else "weight"
            value = value.mT if transposed and suffix == "weight" else value
            interleaved = config.model_type == "gpt_oss"
            gate, up = (value[:, ::2], value[:, 1::2]) if interleaved else value.chunk(2, 1)
            found[f"{block}ffn_gate_exps.{suffix}"] = gate
            found[f"{block}ffn_up_exps.{suffix}"] = up
        elif name.endswith(("experts.down_proj", "experts.down_proj_bias")):
            suffix = "bias" if name.endswith("bias") else "weight"
            value = value.mT if transposed and suffix == "weight" else value
            found[f"{block}ffn_down_exps.{suffix}"] = value
        elif name.endswith("input_linear.weight"):
            found[f"{block}ffn_gate_shexp.weight"], found[f"{block}ffn_up_shexp.weight"] = (
                value.chunk(2)
            )
        elif name.endswith("kv_b_proj.weight") and config.model_type == "deepseek_v3":
            each = value.view(config.num_attention_heads, -1, value.shape[1])
            keys, values = each.split([config.qk_nope_head_dim, config.v_head_dim], 1)
            found[f"{block}attn_k_b.weight"], found[f"{block}attn_v_b.weight"] = keys.mT, values
        elif name.endswith("e_score_correction_bias"):
            found[f"{block}exp_probs_b.bias"] = value
        elif name.endswith("block_sparse_moe.router.weight"):
            found[f"{block}ffn_gate_inp.weight"] = value
        elif name.endswith("sinks"):
            found[f"{block}attn_sinks.weight"] = value
        elif name.endswith("shared_expert_gate.weight"):
            found[f"{block}ffn_gate_inp_shexp.weight"] = value[0]
        else:
            if architecture in ("llama", "granitemoe") and name.endswith(
                ("q_proj.weight", "k_proj.weight")
            ):
                queries = name.endswith("q_proj.weight")
                value = permuted(
                    value, config.num_attention_heads if queries else config.num_key_value_heads
                )
            found[names.get_name(name, try_suffixes=(".weight", ".bias"))] = value
    return {name: np.ascontiguousarray(value.numpy()) for name, value in found.items()}


def _random_k(values, draw):
    """Valid bytes of q4_K, which the package does not make, of small random weights."""
    blocks = draw.integers(0, 256, (values.size // 256, 144), dtype=np.uint8)
    scales = draw.uniform(2e-4, 4e-4, (len(blocks), 2)).astype(np.float16)
    scales[:, 1] *= 8
    blocks[:, :4] = scales.view(np.uint8)
    return blocks.reshape(*values.shape[:-1], -1)


def stored(name, values, kind, draw):
    """The bytes and the type of a tensor in a file whose weights are of a type."""
    exact = values.ndim < 2 or name.endswith(("gate_inp.weight", "_norm.weight", ".bias"))
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if exact or values.shape[-1] % 32:
        kind = Type.F32
    elif values.shape[-1] % block or (
        kind not in (Type.F32, Type.F16) and name in ("token_embd.weight", "output.weight")
    ):
        kind = Type.Q8_0
    if kind is Type.Q4_K:
        return _random_k(values, draw), kind
    return gguf.quantize(values, kind), kind


def _describe(writer, config, architecture):
    """The entries that llama.cpp's converter writes."""
    c = config
    heads = c.num_attention_heads
    writer.add_size_label("8x1K")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(getattr(c, "intermediate_size_mlp", c.intermediate_size))
    writer.add_head_count(heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(c.vocab_size)
    experts = next(
        (value for name in ("num_experts", "num_local_experts", "n_routed_experts")
         if (value := getattr(c, name, None))), None,
    )  # fmt: skip
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(c.num_experts_per_tok)
    if architecture == "deepseek2":
        _describe_deepseek(writer, c)
        return
    writer.add_head_count_kv(c.num_key_value_heads)
    size = getattr(c, "head_dim", None) or c.hidden_size // heads
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    if architecture in ("qwen2moe", "qwen3moe"):
        writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    if architecture == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(c.shared_expert_intermediate_size)
    if architecture in ("gpt-oss", "llama4"):
        writer.add_expert_feed_forward_length(c.intermediate_size)
    if architecture == "gpt-oss":
        writer.add_sliding_window(c.sliding_window)
    if architecture == "llama4":
        writer.add_interleave_moe_layer_step(c.interleave_moe_layer_step)
    if architecture == "granitemoe":
        writer.add_attention_scale(c.attention_multiplier)
        writer.add_embedding_scale(c.embedding_multiplier)
        writer.add_residual_scale(c.residual_multiplier)
        writer.add_logit_scale(c.logits_scaling)
        if size := getattr(c, "shared_intermediate_size", None):
            writer.add_expert_shared_feed_forward_length(size)


def _describe_deepseek(writer, c):
    rotary = c.qk_rope_head_dim
    writer.add_rope_dimension_count(rotary)
    if c.q_lora_rank:
        writer.add_q_lora_rank(c.q_lora_rank)
    writer.add_kv_lora_rank(c.kv_lora_rank)
    if c.model_type == "deepseek_v3":
        writer.add_head_count_kv(1)
        writer.add_key_length(c.kv_lora_rank + rotary)
        writer.add_value_length(c.kv_lora_rank)
        writer.add_key_length_mla(c.qk_nope_head_dim + rotary)
        writer.add_value_length_mla(c.v_head_dim)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_group_count(c.n_group)
        writer.add_expert_group_used_count(c.topk_group)
        writer.add_expert_weights_norm(c.norm_topk_prob)
    else:  # files of 2024 have keys and values of all heads
        writer.add_head_count_kv(c.num_attention_heads)
        writer.add_key_length(c.qk_nope_head_dim + rotary)
        writer.add_value_length(c.v_head_dim)
    writer.add_leading_dense_block_count(c.first_k_dense_replace)
    writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    writer.add_expert_shared_count(c.n_shared_experts)
    writer.add_expert_weights_scale(c.routed_scaling_factor)


def write_mixture(path, model, case, tokenizer, kind=Type.F32, describe=lambda writer: None):
    """Write a model with weights of a type; ``describe`` adds entries."""
    architecture, draw = architecture_of(case), np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    _describe(writer, model.config, architecture)
    describe(writer)
    write_tokenizer(writer, tokenizer, TOKENS)
    for name, values in tensors_of(model, architecture).items():
        data, of = stored(name, values, kind, draw)
        writer.add_tensor(name, data, raw_dtype=of)
    finish(writer)


def write_qwen35moe(path, tokenizer, kind=Type.F32):
    """Write a random Qwen 3.5: linear attention in three of four blocks, 8 experts in each."""
    size, experts, values, keys = 64, 8, (4, 16), (2, 16)
    mixed = 2 * keys[0] * keys[1] + values[0] * values[1]
    writer, draw = gguf.GGUFWriter(path, "qwen35moe"), np.random.default_rng(0)
    counts = {
        "context_length": 128, "block_count": 4, "embedding_length": size,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 32,
        "attention.value_length": 32, "full_attention_interval": 4, "ssm.conv_kernel": 4,
        "ssm.state_size": keys[1], "ssm.group_count": keys[0], "ssm.time_step_rank": values[0],
        "ssm.inner_size": values[0] * values[1], "rope.dimension_count": 8,
        "expert_feed_forward_length": size, "expert_shared_feed_forward_length": size,
        "expert_count": experts, "expert_used_count": 2,
    }  # fmt: skip
    for key, value in counts.items():
        writer.add_uint32(f"qwen35moe.{key}", value)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_array("qwen35moe.rope.dimension_sections", [1, 1, 2, 0])
    write_tokenizer(writer, tokenizer, TOKENS)
    shapes = {"token_embd.weight": (TOKENS, size), "output.weight": (TOKENS, size),
              "output_norm.weight": (size,)}  # fmt: skip
    linear = {
        "attn_qkv.weight": (mixed, size), "attn_gate.weight": (64, size),
        "ssm_alpha.weight": (values[0], size), "ssm_beta.weight": (values[0], size),
        "ssm_conv1d.weight": (mixed, 4), "ssm_norm.weight": (values[1],),
        "ssm_out.weight": (size, 64), "ssm_a": (values[0],), "ssm_dt.bias": (values[0],),
    }  # fmt: skip
    full = {
        "attn_q.weight": (256, size), "attn_k.weight": (64, size), "attn_v.weight": (64, size),
        "attn_output.weight": (size, 128), "attn_q_norm.weight": (32,),
        "attn_k_norm.weight": (32,),
    }  # fmt: skip
    routed = {
        "attn_norm.weight": (size,), "post_attention_norm.weight": (size,),
        "ffn_gate_inp.weight": (experts, size), "ffn_gate_inp_shexp.weight": (size,),
        **{f"ffn_{part}_exps.weight": (experts, size, size) for part in ("gate", "up", "down")},
        **{f"ffn_{part}_shexp.weight": (size, size) for part in ("gate", "up", "down")},
    }  # fmt: skip
    for block in range(4):
        parts = {**(full if block == 3 else linear), **routed}
        shapes |= {f"blk.{block}.{name}": shape for name, shape in parts.items()}
    for name, shape in shapes.items():
        values = draw.normal(size=shape).astype(np.float32) * size**-0.5
        values += "norm" in name
        data, of = stored(name, -abs(values) if name.endswith("ssm_a") else values, kind, draw)
        writer.add_tensor(name, data, raw_dtype=of)
    finish(writer)
