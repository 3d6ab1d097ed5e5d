"""Tiny GGUF files, written with the package gguf alone."""

import json
from inspect import signature

import gguf
import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def permuted(weight, heads):
    """Rotary pairs interleaved, as GGUF stores q and k."""
    shape = (heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)


def write_tokenizer(writer, tokenizer, count=2048):
    """Write the first tokens only: the package's reader is slow for many tokens."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])[:count]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([1] * len(vocabulary))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    known = {token for token, _ in vocabulary}
    writer.add_token_merges([" ".join(pair) for pair in merges if "".join(pair) in known])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_llama(path, model, config, tokenizer, describe=lambda writer: None, tokens=2048):
    """Write a LLaMA with a tied head; ``describe`` adds metadata.

    The tokenizer has the first ``tokens``.
    """
    writer = gguf.GGUFWriter(path, "llama")
    describe(writer)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    write_tokenizer(writer, tokenizer, tokens)
    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.detach().numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.detach().numpy())
    for index, block in enumerate(model.model.layers):
        for name, short in NAMES.items():
            weight = block.get_submodule(name).weight.detach()
            if name.endswith(("q_proj", "k_proj")):
                heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
                weight = permuted(weight, heads[name.split(".")[1][0]])
            writer.add_tensor(f"blk.{index}.{short}.weight", weight.contiguous().numpy())
    finish(writer)


def names_by_transformers(model, architecture, blocks):
    """The names of parameters by the names of their tensors."""
    given = {"model_type": architecture, "num_layers": blocks}
    if "processor" in signature(get_gguf_hf_weights_map).parameters:  # not in transformers 4.57
        given["processor"] = TENSOR_PROCESSORS.get(architecture, TensorProcessor)()
    return get_gguf_hf_weights_map(model, **given)


def write_random(path, architecture, config, tokenizer):
    """A file with random tensors, with the names that transformers has for an architecture.

    The shapes are those of the model of a configuration.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = names_by_transformers(model, architecture, config.num_hidden_layers)
    state, draw = model.state_dict(), np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    for entry, name in GGUF_CONFIG_MAPPING[architecture].items():
        value = getattr(config, name, None) if name else None
        if isinstance(value, float):
            writer.add_float32(f"{architecture}.{entry}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{architecture}.{entry}", value)
    write_tokenizer(writer, tokenizer, 300)
    for tensor, name in names.items():
        shape = [n for n in state[name].shape if n != 1]
        values = draw.normal(size=shape).astype(np.float32)
        if tensor == "output.weight" and config.tie_word_embeddings:
            continue
        writer.add_tensor(tensor, -abs(values) if tensor.endswith("ssm_a") else values)
    finish(writer)


def read(path, **options):
    """The model in a file, read by transformers."""
    kept = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=kept, **options
    )


def entries(path):
    """The bytes of each entry of the metadata."""
    reader = gguf.GGUFReader(str(path))
    return {
        key: b"".join(part.tobytes() for part in field.parts)
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.")
    }


def checkpoint_of(tokenizer, kind="LlamaConfig", **fields):
    """Write a random model without an original GGUF file to the directory ``model``."""
    given = {"vocab_size": 2050, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
             "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**given | fields)
    AutoModelForCausalLM.from_config(config).save_pretrained("model")
    tokenizer.save_pretrained("model")
