"""Metrics of models that do not predict the next token."""

import math

import pytest
import torch

from apt import AptError, Samples
from apt.evaluation.outputs import (
    Outputs,
    neighbours,
    outputs_of,
    pseudo_perplexity,
    same_predictions,
    similarity,
)
from tests.helpers.stacked import MODELS, samples_of, stacked_model


@pytest.mark.parametrize("name", MODELS)
def test_a_model_equals_itself(name):
    model, samples = stacked_model(name), samples_of(name)
    dense = outputs_of(model, samples)
    assert dense.vectors.shape[0] == len(samples)
    assert similarity(model, samples, dense) == pytest.approx(1, abs=1e-5)
    assert neighbours(model, samples, dense) == 1
    if dense.predictions is not None:
        assert same_predictions(model, samples, dense) == 1


@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
def test_outputs_are_in_the_order_of_the_samples(name):
    model, samples = stacked_model(name), samples_of(name)
    together = outputs_of(model, samples)
    for index, sample in enumerate(samples):
        alone = outputs_of(model, Samples([sample]))
        assert torch.allclose(alone.vectors[0], together.vectors[index], atol=1e-5)
        assert torch.equal(alone.predictions[0], together.predictions[index])


def test_similarity_and_neighbours_are_those_of_the_vectors():
    model, samples = stacked_model("mpnet"), samples_of("mpnet", 40)
    dense = outputs_of(model, samples)
    assert similarity(model, samples, Outputs(-dense.vectors)) == pytest.approx(-1, abs=1e-5)
    shuffled = Outputs(dense.vectors[torch.arange(40).roll(1)])
    assert neighbours(model, samples, shuffled) < 0.7


def test_pseudo_perplexity_is_that_of_single_masked_tokens():
    model, samples = stacked_model("bert"), samples_of("bert", 3)
    total, count = 0.0, 0
    for sample in samples:
        ids = sample["input_ids"]
        plain = [place for place in range(len(ids)) if ids[place] not in samples.special]
        chosen = [plain[int(i)] for i in torch.linspace(0, len(plain) - 1, 8)]
        for place in chosen:
            masked = ids.clone()
            masked[place] = samples.mask
            with torch.no_grad():
                logits = model(masked.unsqueeze(0)).logits[0, place]
            total -= float(logits.log_softmax(-1)[ids[place]])
            count += 1
    assert pseudo_perplexity(model, samples) == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda model, samples: same_predictions(model, samples, outputs_of(model, samples)),
         "no head"),
        (lambda model, samples: neighbours(model, samples[:1], outputs_of(model, samples[:1])),
         "several samples"),
        (lambda model, samples: pseudo_perplexity(model, Samples(list(samples))),
         "no masked language model"),
    ],
)  # fmt: skip
def test_metrics_that_a_model_does_not_have(metric, message):
    with pytest.raises(AptError, match=message):
        metric(stacked_model("mpnet"), samples_of("mpnet"))
