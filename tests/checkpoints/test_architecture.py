"""Models that cannot be pruned are refused by their configuration, with the reason."""

import json

import pytest
import transformers

from apt.checkpoints.architecture import class_of, reads_of
from apt.checkpoints.load import open_skeleton
from apt.errors import AptError
from apt.locations.model_source import find
from apt.plugin.registry import registry

OPENED = {
    "T5Config": ("T5ForConditionalGeneration", "texts", True),
    "BartConfig": ("BartForConditionalGeneration", "texts", True),
    "WhisperConfig": ("WhisperForConditionalGeneration", "sounds", True),
    "BertConfig": ("BertForMaskedLM", "texts", False),
    "ElectraConfig": ("ElectraForMaskedLM", "texts", False),
    "ModernBertConfig": ("ModernBertForMaskedLM", "texts", False),
    "ViTConfig": ("ViTForImageClassification", "images", False),
    "CLIPConfig": ("CLIPModel", "texts and images", False),
    "Wav2Vec2Config": ("Wav2Vec2ForCTC", "sounds", False),
}
"""The class without a name of a class, what it reads, and whether it reads a target."""


def refusal(path, adapter=None):
    with pytest.raises(AptError) as caught:
        open_skeleton(find(str(path), registry()), registry(), adapter)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", OPENED)
def test_models_that_do_not_predict_the_next_token_are_opened_with_their_head(name):
    config = getattr(transformers, name)()
    config.architectures = None
    found, words, target = OPENED[name]
    model_class = class_of(config)
    reads = reads_of(model_class, config)
    if found == "CLIPModel" and model_class.__name__ != found:
        pytest.skip("transformers 4 opens it with another head")
    assert model_class.__name__ in (found, "Wav2Vec2ForMaskedLM")
    assert not reads.windows
    assert (reads.words, reads.target) == (words, target)


def test_class_without_a_head_is_opened_without_one():
    config = transformers.BertConfig(architectures=["BertModel"])
    assert class_of(config) is transformers.BertModel


def test_type_without_a_class_is_refused_with_its_kind(tmp_path):
    transformers.EncodecConfig(architectures=None).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "none"}))
    assert refusal(tmp_path)


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"bits": 4}, "an unnamed method"),
    ],
    ids=str,
)
def test_quantised_checkpoints_are_refused_with_the_method(apt, edited, settings, method):
    run = apt("prune", edited("llama", quantization_config=settings))
    assert run.code == 2
    assert f"is quantised with {method}, and its weights cannot be pruned" in run.err
    assert "prune the original model" in run.err
    assert len(run.err.splitlines()) == 1


def test_bert_as_decoder_reads_windows(tmp_path):
    config = transformers.BertConfig(
        is_decoder=True, vocab_size=64, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=64,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    opened = open_skeleton(find(str(tmp_path), registry()), registry())
    assert opened.spec.name == "bert"
    assert opened.reads.windows


def test_model_with_code_in_its_repository_asks_to_allow_the_code(tmp_path):
    auto = {"AutoModelForCausalLM": "theirs.Model"}
    config = transformers.ViTConfig().to_dict() | {"auto_map": auto}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "needs code from its repository" in refusal(tmp_path)


def test_class_of_follows_the_architectures_of_the_configuration(tmp_path):
    """The class of Qwen3.5 for text alone has no tower for images."""
    multimodal = pytest.importorskip("transformers.models.qwen3_5").Qwen3_5Config()
    assert class_of(multimodal).__name__ == "Qwen3_5ForConditionalGeneration"
    assert class_of(transformers.LlavaConfig()).__name__ == "LlavaForConditionalGeneration"
    for names in (["LlamaForCausalLM"], ["NoSuchClass"], 5, [5], None):  # another type, or invalid
        config = transformers.GPT2Config(architectures=names)
        assert class_of(config).__name__ == "GPT2LMHeadModel"
