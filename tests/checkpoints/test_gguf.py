"""GGUF files: a tiny LLaMA written with the `gguf` package, read, pruned and saved."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import TEXT
from tests.helpers.families import CONFIGS, random_model, random_tokens

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
pytest.importorskip("accelerate", reason="the extra [gguf] is not installed")

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


def write_tokenizer(writer, tokenizer):
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([1] * len(vocabulary))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)


@pytest.fixture
def file(tmp_path, tokenizer):
    model = random_model("llama-grouped-tied")
    write(tmp_path / "tiny.gguf", model, CONFIGS["llama-grouped-tied"], tokenizer)
    return tmp_path / "tiny.gguf", model


def write(path, model, config, tokenizer):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    write_tokenizer(writer, tokenizer)
    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.detach().numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.detach().numpy())
    for index, block in enumerate(model.model.layers):
        for name, short in NAMES.items():
            weight = block.get_submodule(name).weight.detach()
            if name.endswith(("q_proj", "k_proj")):
                heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
                weight = permuted(weight, heads[name.split(".")[1][0]])
            writer.add_tensor(f"blk.{index}.{short}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_pruned_to_a_plain_directory(apt, file):
    path, original = file
    sample = random_tokens(samples=2)
    small = ("--samples", 4, "--seqlen", 32, "--calibration", TEXT)
    run = apt("prune", path, *small, "--dtype", "float32")
    assert run.code == 0, run.err
    pruned = AutoModelForCausalLM.from_pretrained("tiny-2of4-admm")
    assert not getattr(pruned.config, "quantization_config", None)
    assert torch.equal(pruned.model.embed_tokens.weight, original.model.embed_tokens.weight)
    with torch.no_grad():
        assert torch.isfinite(pruned(sample).logits).all()
    weight = pruned.model.layers[1].mlp.up_proj.weight
    assert int(((weight.view(-1, 4) != 0).sum(1) > 2).sum()) == 0
    kept = weight != 0
    dense = original.model.layers[0].self_attn.q_proj.weight
    first = pruned.model.layers[0].self_attn.q_proj.weight
    assert torch.corrcoef(torch.stack([dense[first != 0], first[first != 0]]))[0, 1] > 0.7
    assert kept.any()


def test_a_smaller_model_is_a_gguf_file_like_any_other(apt, file, tokenizer):
    sizes = ("--size", "channels=40", "--blocks", 2)
    made = apt("shrink", file[0], *sizes, "--samples", 4, "--seqlen", 24, "--calibration", TEXT,
               "--effort", "fast", "-o", "small")  # fmt: skip
    assert made.code == 0, made.err
    small = AutoModelForCausalLM.from_pretrained("small").eval()
    write("small.gguf", small, small.config, tokenizer)
    opened = AutoModelForCausalLM.from_pretrained(".", gguf_file="small.gguf").eval()
    tokens = random_tokens(2, 12)
    torch.testing.assert_close(opened(tokens).logits, small(tokens).logits, rtol=1e-4, atol=1e-4)
