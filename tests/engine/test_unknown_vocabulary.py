"""Models that read text, and whose embeddings of tokens transformers does not know."""

import pytest
import torch
from apt_adapters.example_inputs import example_inputs

import apt as library
from apt.errors import AptError
from tests.helpers.releases import needs

pytestmark = needs("transformers", "5.20", "some types of models")


@pytest.fixture
def canine(tiny):
    """A tiny random model of CANINE, which hashes characters, and its samples."""
    model = tiny.other_model("canine")
    inputs = example_inputs(model, 4)
    samples = [{name: values[index] for name, values in inputs.items()} for index in range(4)]
    return model, library.Samples(samples)


def test_default_has_no_random_tokens(canine):
    model, samples = canine
    report = library.prune(model, samples, pattern="0.5")
    assert report.options["random_tokens"] == 0
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_random_tokens_are_refused(canine):
    model, samples = canine
    options = library.PruneOptions(random_tokens=0.5)
    with pytest.raises(AptError, match="whose tokens have no known embeddings") as raised:
        library.prune(model, samples, pattern="0.5", options=options)
    assert raised.value.options == ("random_tokens",)
