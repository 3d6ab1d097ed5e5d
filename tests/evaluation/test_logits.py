"""Logits in parts equal the logits of the model, also with scaling and soft caps."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
)

import apt.evaluation.logits
from apt.checkpoints.load import open_skeleton
from apt.engine.costs import PlannedRun
from apt.engine.estimate import estimate
from apt.evaluation.blockwise import streamed
from apt.evaluation.logits import kept_states, parts_of_logits
from apt.evaluation.metrics import accuracy, agreement, divergence, perplexity
from apt.locations.model_source import find
from apt.options import PruneRun
from apt.planning.plan import make_plan
from apt.plugin.registry import registry
from apt.solver import NM
from apt.text.augmentation import Augmentation
from tests.helpers.families import CONFIGS, VOCABULARY, random_model, random_tokens

SAMPLES, SEQLEN = 3, 11
TOKENS = random_tokens(SAMPLES, SEQLEN)
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
SCALED = {
    "gemma2": Gemma2Config(final_logit_softcapping=0.5, head_dim=8, num_key_value_heads=2, **SMALL),
    "granite": GraniteConfig(logits_scaling=0.125, **SMALL),
    "cohere": CohereConfig(logit_scale=7.0, **SMALL),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4),
    "neox": GPTNeoXConfig(**SMALL),
}


@pytest.fixture
def of_two_tokens(monkeypatch):
    """Let each part have two tokens of each sample."""
    monkeypatch.setattr("apt.evaluation.logits.PART", 2 * 4 * VOCABULARY * SAMPLES)


def scaled(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SCALED[name])
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@torch.no_grad()
@pytest.mark.usefixtures("of_two_tokens")
@pytest.mark.parametrize("name", [*CONFIGS, *SCALED])
def test_parts_equal_the_logits_of_the_model(name):
    model = scaled(name) if name in SCALED else random_model(name)
    whole = model(TOKENS, use_cache=False).logits
    parts = list(parts_of_logits(model, TOKENS))
    assert [part.shape[1] for part in parts] == [2] * 5 + [1]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_logits_that_fit_are_one_identical_part():
    model = random_model("llama")
    [logits] = parts_of_logits(model, TOKENS)
    assert torch.equal(logits, model(TOKENS, use_cache=False).logits)


@pytest.mark.usefixtures("of_two_tokens")
@pytest.mark.parametrize("measure", [perplexity, accuracy])
def test_metrics_do_not_depend_on_the_size_of_parts(measure, monkeypatch):
    model = random_model("llama")
    result = measure(model, TOKENS)
    monkeypatch.setattr("apt.evaluation.logits.PART", 2**40)
    assert result == pytest.approx(measure(model, TOKENS), rel=1e-5)


class Headless(torch.nn.Module):
    """A model whose body cannot be separated from its head."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, tokens, **options):
        return self.inner(tokens, **options)


@torch.no_grad()
@pytest.mark.usefixtures("of_two_tokens")
def test_model_without_separable_head_gives_one_part():
    model = random_model("llama")
    [logits] = parts_of_logits(Headless(model), TOKENS)
    assert torch.equal(logits, model(TOKENS, use_cache=False).logits)


@torch.no_grad()
@pytest.mark.usefixtures("of_two_tokens")
def test_wrapped_forward_of_the_body_is_restored_after_an_error():
    model = random_model("llama")
    wrapped, whole = [], model.model.forward

    def forward(*args, **kwargs):
        wrapped.append(1)
        return whole(*args, **kwargs)

    model.model.forward = forward
    assert len(list(parts_of_logits(model, TOKENS))) == 6
    assert len(wrapped) == 1
    with pytest.raises(IndexError):
        next(parts_of_logits(model, TOKENS + VOCABULARY))
    assert model.model.forward is forward


@torch.no_grad()
@pytest.mark.parametrize("variant", ["llama", "opt", "bloom", "mamba"])
def test_streamed_model_is_measured_in_parts(variant, checkpoint, monkeypatch):
    skeleton = open_skeleton(find(str(checkpoint(variant)), registry()), registry())
    monkeypatch.setattr("apt.evaluation.logits.PART", 2 * 4 * VOCABULARY * SAMPLES)
    heads = []
    with streamed(skeleton, TOKENS, "cpu") as module:
        module.get_output_embeddings().register_forward_hook(
            lambda head, args, logits: heads.append(logits.shape[1])
        )
        result = perplexity(module, TOKENS)
    assert max(heads) == 2
    assert result == pytest.approx(perplexity(random_model(variant), TOKENS), rel=1e-5)


def test_part_bytes_is_bounded():
    assert apt.evaluation.logits.part_bytes(2048, samples=4, seqlen=8) == 4 * 4 * 2048 * 32
    assert apt.evaluation.logits.part_bytes(2**18, samples=8, seqlen=256) == 4 * 2**26
    assert apt.evaluation.logits.part_bytes(2**20, samples=32, seqlen=1) == 4 * 4 * 2**25


def test_estimate_includes_the_memory_of_logits(monkeypatch):
    skeleton = open_skeleton(find("zoo:llama", registry()), registry())
    plan = make_plan(skeleton.module, skeleton.adapter, NM(2, 4))

    def needs(**how):
        return estimate(PlannedRun(skeleton, plan, PruneRun(samples=1, seqlen=32), **how))

    small = needs()
    assert needs(augmentation=Augmentation(own_samples=1)).predicting >= small.predicting
    untuned, scored = needs(tuned=False), needs(tuned=False, factors=False)
    assert scored.working < untuned.working <= small.working
    monkeypatch.setattr("apt.engine.estimate.vocabulary", lambda model: 2**22)
    large = needs()
    assert large.predicting > 2**30
    assert large.memory > large.process + large.weights + 2**30


def test_metrics_share_one_run_of_the_body():
    model, dense = random_model("llama"), random_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    tokens = random_tokens(4, 24)
    metrics = (perplexity, accuracy), (divergence, agreement)
    alone = [m(model, tokens) for m in metrics[0]] + [m(model, tokens, dense) for m in metrics[1]]
    runs = []
    for name, result in (("model", model), ("dense", dense)):
        result.model.layers[0].register_forward_hook(lambda *_, n=name: runs.append(n))
    with kept_states(dense), kept_states(model):
        shared = [m(model, tokens) for m in metrics[0]]
        shared += [m(model, tokens, dense) for m in metrics[1]]
        assert runs == ["model", "dense"]
        assert perplexity(model, tokens[:2]) != shared[0]  # other tokens
    assert shared == alone
    assert len(runs) == 3
    perplexity(model, tokens)
    assert len(runs) == 4


def test_states_are_kept_up_to_most_states(monkeypatch):
    four_samples = 4 * 24 * 32 * 4
    monkeypatch.setattr(apt.evaluation.logits, "MOST_STATES", four_samples)
    model, runs = random_model("llama"), []
    model.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    first, second = random_tokens(4, 24), random_tokens(4, 24, seed=1)
    with kept_states(model):
        for tokens in (first, second, first, second):
            perplexity(model, tokens)
    assert len(runs) == 3
