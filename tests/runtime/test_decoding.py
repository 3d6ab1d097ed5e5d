"""Blocks that run a token in one call of ``apt-kernels`` give the outputs of the blocks."""

import copy
import functools
import pickle

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import apt.runtime as runtime
from apt.packing.directory import pack
from apt.runtime import decoding
from apt.runtime.decoding import Decoder, DecodingLayer, Family
from apt.runtime.linear import FEW, kernels

pytestmark = pytest.mark.skipif(
    getattr(kernels(), "Block", None) is None, reason="needs apt-kernels with its library"
)
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 60, "max_position_embeddings": 512,
    "attn_implementation": "sdpa", "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama-biases": LlamaConfig(attention_bias=True, **SIZES),
    "mistral": MistralConfig(sliding_window=None, head_dim=20, **SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(head_dim=24, **SIZES),
}
PROMPT = torch.tensor([[5, 17, 3, 40, 22, 8, 31]])


@pytest.fixture
def packed(tmp_path):
    """A function that makes a random packed model."""

    def make(name="llama", dtype=torch.bfloat16):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).to(dtype)
        names = []
        with torch.no_grad():
            for path, module in model.named_modules():
                if isinstance(module, torch.nn.Linear) and path != "lm_head":
                    module.weight.normal_(std=0.2)
                    module.weight[torch.rand_like(module.weight) < 0.5] = 0
                    names.append(f"{path}.weight")
                    if module.bias is not None:
                        module.bias.normal_()
                elif "norm" in path:
                    module.weight.uniform_(0.5, 1.5)
        model.save_pretrained(tmp_path / "dense")
        (tmp_path / "packed").mkdir()
        pack(tmp_path / "dense", dict.fromkeys(names), tmp_path / "packed")
        return runtime.load(tmp_path / "packed")

    return make


@pytest.fixture
def runs(monkeypatch):
    """The number of tokens of single blocks that ran in one call, in a list."""
    calls, run = [0], Decoder.run

    def counted(*given):
        calls[0] += 1
        return run(*given)

    monkeypatch.setattr(Decoder, "run", counted)
    return calls


def generated(model, new=12, prompt=PROMPT, **options):
    with torch.no_grad():
        found = model.generate(
            prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False,
            return_dict_in_generate=True, output_logits=True, **options,
        )  # fmt: skip
    return torch.stack(found.logits).float()


def itself(model, monkeypatch, **options):
    """The output that the blocks generate without the call."""
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "_cached", lambda *_: None)
        return generated(model, **options)


def test_blocks_are_unchanged_without_kernels(packed, monkeypatch):
    monkeypatch.setattr(decoding, "kernels", lambda: None)
    assert not any(isinstance(m, DecodingLayer) for m in packed().modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_decoded_tokens_equal_those_of_the_blocks(packed, monkeypatch, runs, name, dtype):
    model = packed(name, dtype)
    found, expected = generated(model), itself(model, monkeypatch)
    # In each layer the first token of the decoding is run in both ways.
    assert runs[0] == 2 * 11
    assert_near(found, expected, 1e-4 if dtype == torch.float32 else 0.06)
    assert torch.equal(found, generated(model))
    assert runs[0] == 4 * 11


def assert_near(found, expected, bound):
    """Logits (tokens, batch, vocabulary) of each sequence up to the first other token are near."""
    same = (found.argmax(-1) == expected.argmax(-1)).cumprod(0).sum(0)
    assert int(same.min()) >= 2  # in bf16 two tokens can be as likely
    for sequence, count in enumerate(same.tolist()):
        errors = (found - expected)[: count + 1, sequence].abs()
        assert float(errors.max()) < bound * float(expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_several_sequences_with_and_without_padding(packed, monkeypatch, runs, name, dtype):
    model, bound = packed(name, dtype), 1e-4 if dtype == torch.float32 else 0.06
    prompt = torch.randint(2, 60, (5, 7), generator=torch.Generator().manual_seed(0))
    padding = torch.ones_like(prompt)
    padding[1, :3] = padding[3, :6] = padding[4, :1] = 0
    for mask in (torch.ones_like(prompt), padding):
        runs[0] = 0
        given = {"prompt": prompt.masked_fill(mask == 0, 0), "attention_mask": mask}
        found = generated(model, **given)
        assert runs[0] == 2 * 11
        assert_near(found, itself(model, monkeypatch, **given), bound)


def test_beams_are_decoded(packed, monkeypatch, runs):
    model = packed(dtype=torch.float32)
    found = generated(model, num_beams=3)
    assert runs[0] == 2 * 11
    assert_near(found, itself(model, monkeypatch, num_beams=3), 1e-4)


def test_unsupported_inputs_run_the_block_itself(packed, monkeypatch, runs):
    model = packed()
    generated(model)
    runs[0] = 0
    hole = torch.tensor([[1, 1, 0, 1, 1, 1, 1]])
    for options in (
        {"attention_mask": hole}, {"cache_implementation": "static"},
        {"prompt": PROMPT.repeat(FEW + 1, 1)},
    ):  # fmt: skip
        assert torch.equal(generated(model, **options), itself(model, monkeypatch, **options))
    assert runs[0] == 0


def test_hook_is_called_for_every_token(packed):
    model, seen = packed(), []
    generated(model)
    model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    generated(model)
    assert len(seen) == 12


def test_output_attentions_has_every_token(packed, runs):
    model = packed()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model.generate(
            PROMPT, max_new_tokens=5, min_new_tokens=5, do_sample=False,
            return_dict_in_generate=True, output_attentions=True,
        )  # fmt: skip
    assert [part[0].shape[-1] for part in found.attentions] == [7, 8, 9, 10, 11]


def test_decoder_is_refused_for_a_changed_block(packed, monkeypatch, runs):
    model = packed()
    kind = type(model.model.layers[0]).__mro__[2]
    own = kind.forward

    @functools.wraps(own)
    def scaled(self, x, **named):
        return x + 0.7 * (own(self, x, **named) - x)

    monkeypatch.setattr(kind, "forward", scaled)
    monkeypatch.setattr(type(model.model.layers[0]), "_family", Family(kind))
    found = generated(model)
    assert runs[0] == 2  # the comparisons
    assert torch.equal(found, itself(model, monkeypatch))


def test_cropped_and_copied_caches_continue_correctly(packed):
    model = packed(dtype=torch.float32)
    tokens = torch.arange(2, 12)[None]

    def step(cache, *numbers):
        for number in numbers:
            logits = model(torch.tensor([[number]]), past_key_values=cache).logits
        return logits

    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(tokens, past_key_values=cache)
        expected = step(cache, 20, 21, 22)
        other = copy.deepcopy(cache)
        cache.crop(-2)
        step(cache, 40, 41)
        assert cache.get_seq_length() == other.get_seq_length() == 13
        assert not torch.equal(cache.layers[0].keys, other.layers[0].keys)
        cache.crop(-2)
        torch.testing.assert_close(step(cache, 21, 22), expected)
        torch.testing.assert_close(step(cache, 30), step(other, 30))


def test_text_longer_than_the_reserve_is_decoded(packed, monkeypatch):
    model = packed(dtype=torch.float32)
    found, expected = generated(model, new=150), itself(model, monkeypatch, new=150)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_copies_and_casts_get_decoders_of_their_own(packed, runs):
    model = packed()
    expected = generated(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layer = other.model.layers[0]
        assert type(layer) is type(model.model.layers[0])
        assert layer._decoder is None
        assert torch.equal(generated(other), expected)
        assert layer._decoder is not model.model.layers[0]._decoder
    runs[0] = 0
    wide = generated(torch.nn.Module.float(model))
    assert runs[0] == 2 * 11
    assert torch.allclose(wide, expected, atol=0.1 * float(expected.abs().max()))


def test_changes_between_tokens_are_detected(packed, monkeypatch):
    model = packed("llama-biases", torch.float32)
    generated(model)
    for layer in model.model.layers:  # each change is one that the memory alone does not show
        with torch.no_grad():
            layer.input_layernorm.weight.mul_(2)
            layer.self_attn.q_proj.bias.add_(1)
        other = torch.nn.Linear(96, 64, bias=False)
        layer.mlp.down_proj = other
    found, expected = generated(model), itself(model, monkeypatch)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_offloaded_model_generates_the_same_tokens(packed, runs):
    """The norms have no memory when a block begins. A former version crashed the process."""
    accelerate = pytest.importorskip("accelerate")
    model = packed(dtype=torch.float32)
    expected, runs[0] = generated(model), 0
    accelerate.cpu_offload(model, execution_device="cpu")
    torch.testing.assert_close(generated(model), expected, rtol=1e-3, atol=1e-3)
    assert runs[0] == 0
