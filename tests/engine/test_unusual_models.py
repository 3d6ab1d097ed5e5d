"""Models whose calls differ from those of most models, pruned by the default method."""

import pytest
import torch
from apt_adapters.example_inputs import example_inputs
from transformers import Cache

import apt as library
from apt.errors import AptError
from apt.events import BlockTuned
from tests.helpers.families import adapter_of
from tests.helpers.releases import needs

pytestmark = needs("transformers", "5.20", "some types of models")


def samples_of(model, count=4):
    inputs = example_inputs(model, count)
    rows = ({name: values[index] for name, values in inputs.items()} for index in range(count))
    return library.Samples(list(rows))


def test_stream_of_zeros_before_the_first_block_is_calibrated(tiny):
    """The queries of DETR are zero before its decoder; its values are their bias then."""
    model = tiny.other_model("detr")
    report = library.prune(model, samples_of(model), pattern="2:4")
    first = {s.name: s for s in report.sites if s.name.startswith("decoder.layers.0.self_attn")}
    assert first["decoder.layers.0.self_attn.o_proj"].relative_error < 0.5
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_no_part_of_a_model_makes_a_cache(tiny):
    """Decision Transformer has no argument for a cache, and its GPT-2 makes one by default.

    A recorded call with a cache would add to it again at each replay.
    """
    model, events = tiny.other_model("decision_transformer"), []
    inputs = example_inputs(model, 2)
    _, calls = adapter_of(model).enter(model, inputs)
    values = [value for call in calls for value in (*call.args, *call.kwargs.values())]
    assert not any(isinstance(value, Cache) for value in values)
    assert model.config.use_cache
    library.prune(model, samples_of(model), pattern="2:4", observe=events.append)
    assert [event for event in events if isinstance(event, BlockTuned)]


def test_decoder_of_text_without_known_embeddings_is_refused_in_one_line(tiny):
    model = tiny.other_model("clvp")
    with pytest.raises(AptError, match="has no embeddings of tokens") as raised:
        library.prune(model, tiny.tokens(), pattern="2:4", other_tokens=tiny.tokens())
    assert raised.value.options == ("own_samples", "random_tokens", "norm_epochs")
