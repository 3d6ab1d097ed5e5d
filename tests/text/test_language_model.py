"""Multimodal models that contain a whole model of text are pruned, measured and trained on text."""

import math

import pytest
import torch

import apt as library
from apt.evaluation.metrics import perplexity
from apt.recovery.objective import next_token_loss
from apt.recovery.teacher import Teacher, write_teacher
from apt.text.language_model import language_model
from tests.helpers.families import random_model
from tests.helpers.releases import needs

pytestmark = needs("transformers", "5.20", "some types of models")


def test_other_models_are_their_language_model(tiny):
    for model in (random_model("llama"), tiny.model("llava", image=True), tiny.other_model("t5")):
        assert language_model(model) is model


@pytest.mark.parametrize("kind", ["blip-2", "kosmos-2", "llama4"])
def test_model_of_images_is_pruned_by_default_without_an_image(tiny, kind, tmp_path):
    model, tokens = tiny.model(kind, image=True), tiny.tokens()
    reader = language_model(model)
    assert reader is not model
    assert reader.get_output_embeddings() is model.get_output_embeddings()
    if kind != "llama4":  # since transformers 5.25 it runs on text alone
        with torch.no_grad(), pytest.raises((TypeError, ValueError, AttributeError)):
            model(input_ids=tokens)
    before = perplexity(model, tokens)
    report = library.prune(model, tokens, pattern="2:4", other_tokens=tokens.flip(0))
    assert report.calibration["own_samples"]
    assert report.norms["vectors"]
    after = perplexity(model, tokens)
    assert after != before
    # What a recovery computes.
    with torch.no_grad():
        loss = float(next_token_loss(model, {"input_ids": tokens}))
        expected = reader(input_ids=tokens).logits.float().log_softmax(-1).topk(4).values
    assert math.exp(loss) == pytest.approx(after, rel=1e-4)
    write_teacher(model, tokens, 4, tmp_path / "teacher")
    _, logs = Teacher(tmp_path / "teacher").top(torch.arange(len(tokens)))
    torch.testing.assert_close(logs, expected, rtol=1e-2, atol=1e-2)
