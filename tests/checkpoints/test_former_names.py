"""Files that transformers 5 writes also have the names of transformers 4."""

import json
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PretrainedConfig

from apt.checkpoints.former_names import save_config, save_tokenizer

LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def llama(directory, **values):
    """A configuration that was read from a file of transformers 4."""
    config = LlamaConfig(num_hidden_layers=1, hidden_size=32).to_dict()
    config.pop("rope_parameters", None)
    (directory / "config.json").write_text(json.dumps(config | values))
    return AutoConfig.from_pretrained(directory)


@pytest.mark.parametrize("scaling", [None, LLAMA_3])
def test_saved_config_has_rope_theta_and_rope_scaling(tmp_path, scaling):
    config = llama(tmp_path, rope_theta=500000.0, rope_scaling=scaling)
    save_config(config, tmp_path)
    written = read(tmp_path / "config.json")
    assert written["rope_theta"] == 500000.0
    assert {**(written.get("rope_scaling") or {})} == (scaling or {})
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_saved_config_of_gemma3_has_both_base_frequencies(tmp_path):
    written = {
        "model_type": "gemma3_text", "num_hidden_layers": 6, "rope_theta": 7e6,
        "rope_local_base_freq": 7e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(written))
    config = AutoConfig.from_pretrained(tmp_path)
    save_config(config, tmp_path)
    assert {key: read(tmp_path / "config.json")[key] for key in written} == written
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


class Nested(PretrainedConfig):
    """A configuration with a nested one, as multimodal models have."""

    model_type = "nested"


def test_nested_configuration_has_former_names(tmp_path):
    inner = {"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}
    save_config(Nested(language=inner), tmp_path)
    written = read(tmp_path / "config.json")
    assert written["language"] == inner | {"rope_theta": 7.0}
    assert "rope_theta" not in written


class Strict(PretrainedConfig):
    """A configuration that refuses the former names."""

    model_type = "strict"

    def __init__(self, **values: Any) -> None:
        if "rope_theta" in values:
            raise ValueError("rope_theta is not known")
        super().__init__(**values)


class Changed(PretrainedConfig):
    """A configuration in which the former names change another value."""

    model_type = "changed"

    def __init__(self, size: int = 1, **values: Any) -> None:
        self.size = size + ("rope_theta" in values)
        super().__init__(**values)


@pytest.mark.parametrize("kind", [Strict, Changed])
def test_config_is_unchanged_if_former_names_change_its_meaning(tmp_path, kind):
    config = kind(language={"rope_parameters": {"rope_theta": 7.0}})
    config.rope_parameters = {"rope_theta": 7.0, "rope_type": "default"}
    config.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    save_config(config, tmp_path)
    assert (tmp_path / "config.json").read_text() == text


def test_converted_model_opens_in_transformers_4_and_5(apt, tmp_path):
    """`convert` writes configuration and tokenizer anew, here with another dtype."""
    assert apt("convert", "zoo:llama", "--dtype", "float32", "-o", "fp32").code == 0
    values = read(tmp_path / "fp32/config.json")
    assert values["rope_theta"] == 10000.0
    values = read(tmp_path / "fp32/tokenizer_config.json")
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "fp32")
    assert tokenizer.decode(tokenizer("A text.")["input_ids"]).strip() == "A text."


def test_saved_tokenizer_has_additional_special_tokens(checkpoint, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("llama"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<one>", "<two>"]})
    save_tokenizer(tokenizer, tmp_path)
    values = read(tmp_path / "tokenizer_config.json")
    assert values["additional_special_tokens"] == ["<one>", "<two>"]
    assert not isinstance(values.get("extra_special_tokens"), list)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert again("a<two>b")["input_ids"] == tokenizer("a<two>b")["input_ids"]
