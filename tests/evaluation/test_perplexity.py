"""Perplexity against its definition."""

import math

import pytest
import torch

from apt.evaluation.metrics import accuracy, perplexity
from tests.helpers.families import random_model, random_tokens


@torch.no_grad()
def test_perplexity_is_the_mean_over_all_predicted_tokens(monkeypatch):
    monkeypatch.setattr("apt.evaluation.metrics._TOKENS_PER_BATCH", 50)
    model, tokens = random_model("llama"), random_tokens(samples=5, seqlen=20)
    total = 0.0
    for row in tokens:
        logits = model(row[None]).logits[0].double().log_softmax(-1)
        total -= sum(float(logits[i, row[i + 1]]) for i in range(19))
    assert perplexity(model, tokens) == pytest.approx(math.exp(total / (5 * 19)), rel=1e-4)


@torch.no_grad()
def test_accuracy_is_the_share_of_tokens_ranked_first(monkeypatch):
    monkeypatch.setattr("apt.evaluation.metrics._TOKENS_PER_BATCH", 50)
    model, tokens = random_model("llama"), random_tokens(samples=5, seqlen=20)
    for place in range(1, 20, 2):  # right for every other token, or more
        tokens[:, place] = model(tokens[:, :place]).logits[:, -1].argmax(-1)
    right = 0
    for row in tokens:
        best = model(row[None]).logits[0].argmax(-1)
        right += sum(int(best[i] == row[i + 1]) for i in range(19))
    assert 0.4 < right / 95 < 1
    assert accuracy(model, tokens) == pytest.approx(right / 95)
