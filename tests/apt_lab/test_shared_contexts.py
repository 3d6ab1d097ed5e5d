"""Questions that are run once for all choices have the likelihoods of the harness."""

import pytest
import torch
from apt_lab.tasks.shared_contexts import SharedContexts, _questions
from lm_eval.models.huggingface import HFLM

from tests.helpers.families import adapter_of, random_model

LONG = 40  # tokens: the limit of the models here


def requests():
    """Questions with one to four choices of one to five tokens, texts, and a long question."""
    draw = torch.Generator().manual_seed(0)

    def tokens(count):
        return torch.randint(3, 60, (count,), generator=draw).tolist()

    found = []
    for question in range(12):
        context = tokens(2 + 3 * (question % 4))
        choices = [tokens(1 + (question + choice) % 5) for choice in range(1 + question % 4)]
        found += [((f"{context}", f"{choice}"), context, choice) for choice in choices]
    found += [(("", f"{text}"), [1], text) for text in (tokens(30), tokens(8), tokens(20))]
    long = tokens(LONG)
    found += [(("long", f"{choice}"), long, choice) for choice in (tokens(3), tokens(4))]
    return [found[index] for index in torch.randperm(len(found), generator=draw)]


@pytest.mark.parametrize(
    ("family", "shared"),
    [("llama", True), ("opt", True), ("mistral", True), ("bloom", False), ("mamba", False)],
)  # BLOOM takes no positions, and Mamba mixes all tokens
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_likelihoods_equal_those_of_the_harness(family, shared, dtype, monkeypatch, tokenizer):
    model, asked, rows = random_model(family).to(dtype), requests(), []
    given = {"pretrained": model, "backend": "causal", "tokenizer": tokenizer, "batch_size": 4,
             "max_length": LONG, "device": "cpu", "softmax_dtype": "float32"}  # fmt: skip
    likelihoods = SharedContexts._likelihoods

    def counted(self, batch):
        rows.extend(batch)
        return likelihoods(self, batch)

    monkeypatch.setattr(SharedContexts, "_likelihoods", counted)
    with adapter_of(model).running(model):
        found = SharedContexts(**given)._loglikelihood_tokens(asked, True)
        expected = HFLM(**given)._loglikelihood_tokens(asked, True)
    exact = dtype == torch.float32
    for (value, greedy), (other, likeliest) in zip(found, expected, strict=True):
        assert value == pytest.approx(other, rel=1e-5 if exact else 0.02)
        assert greedy == likeliest or not exact
    questions = _questions(asked, LONG)
    window = getattr(model.config, "sliding_window", None) or LONG
    branching = [q for q in questions if q.branches and shared and len(q.row) <= window]
    assert bool(branching) == shared
    together = [row for row in rows if row in branching]
    assert len(together) == len(branching)


def test_model_with_interacting_choices_is_detected(monkeypatch, tokenizer):
    model = random_model("llama")
    forward = model.forward

    def mixing(*args, attention_mask=None, **kwargs):
        """It ignores masks of its own shape, as a layer without attention does."""
        plain = attention_mask is None or attention_mask.ndim < 4
        return forward(*args, attention_mask=attention_mask if plain else None, **kwargs)

    given = {"pretrained": model, "backend": "causal", "tokenizer": tokenizer, "batch_size": 4,
             "max_length": LONG, "device": "cpu"}  # fmt: skip
    expected = HFLM(**given)._loglikelihood_tokens(requests(), True)
    monkeypatch.setattr(model, "forward", mixing)
    found = SharedContexts(**given)._loglikelihood_tokens(requests(), True)
    assert [value for value, _ in found] == pytest.approx([v for v, _ in expected], rel=1e-5)
