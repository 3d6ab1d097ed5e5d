"""Models that cannot be pruned are refused by their configuration, with the reason."""

import json

import pytest
import transformers

from apt.checkpoints.architecture import class_of
from apt.checkpoints.load import open_skeleton
from apt.errors import AptError
from apt.locations.model_source import find
from apt.plugin.registry import registry

ENCODER_DECODERS = ["T5Config", "BartConfig", "WhisperConfig", "MT5Config", "PegasusConfig"]
ENCODERS = ["BertConfig", "RobertaConfig", "XLMConfig", "ElectraConfig", "ModernBertConfig"]
OTHERS = ["ViTConfig", "CLIPConfig"]
(OTHERS if transformers.__version__ >= "5" else ENCODERS).append("Wav2Vec2Config")


def refusal(path, adapter=None):
    with pytest.raises(AptError) as caught:
        open_skeleton(find(str(path), registry()), registry(), adapter)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("adapter", [None, "auto"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, "is an encoder-decoder model (type '") for name in ENCODER_DECODERS),
        *((name, "is an encoder (type '") for name in ENCODERS),
        *((name, "of which transformers has no causal language model") for name in OTHERS),
    ],
)
def test_other_kinds_of_model_are_refused_with_their_kind(tmp_path, name, message, adapter):
    getattr(transformers, name)().save_pretrained(tmp_path)
    assert message in refusal(tmp_path, adapter)
    assert "APT prunes causal language models" in refusal(tmp_path, adapter)


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


def test_bert_as_decoder_opens_with_the_automatic_adapter(tmp_path):
    config = transformers.BertConfig(
        is_decoder=True, vocab_size=64, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=64,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    opened = open_skeleton(find(str(tmp_path), registry()), registry())
    assert opened.spec.name == "auto"


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
