"""Questions that are run once with all of their choices have the likelihoods of the harness."""

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
    [("llama", True), ("opt", True), ("mistral", False), ("bloom", False), ("mamba", False)],
)  # Mistral attends to a few tokens only, BLOOM has no positions, Mamba no attention
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_likelihoods_are_those_of_the_harness(family, shared, dtype, tokenizer, monkeypatch):
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
    branching = sum(question.branches for question in _questions(asked, LONG))
    assert 0 < branching < 12
    assert sum(question.branches for question in rows) == 1 + branching * shared
