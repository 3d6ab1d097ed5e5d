"""Loading: every source, and every way in which a checkpoint can be bad."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from apt.checkpoints.load import fingerprint, load, load_tokenizer, open_skeleton
from apt.errors import AptError
from apt.locations.model_source import find
from apt.plugin.registry import registry
from tests.helpers.families import FAMILIES


def loaded(reference, **options):
    return load(open_skeleton(find(str(reference), registry()), registry()), **options)


@pytest.fixture
def damaged(checkpoint, tmp_path):
    """A copy of a checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))


@pytest.mark.parametrize("name", FAMILIES)
def test_zoo_models_load_in_their_own_dtype(name):
    model = loaded(f"zoo:{name}")
    assert model.spec.name == name
    assert next(model.module.parameters()).dtype == torch.bfloat16
    assert model.source.name == name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_directory_keeps_its_dtype_unless_told(checkpoint, dtype):
    path = checkpoint("opt-350m", dtype=dtype)
    assert next(loaded(path).module.parameters()).dtype == dtype
    assert next(loaded(path, dtype=torch.float32).module.parameters()).dtype == torch.float32


def test_an_adapter_that_does_not_load_is_one_line(checkpoint):
    adapters = registry().adapters
    specs = {**adapters.specs, "llama": replace(adapters.get("llama"), target="typo:Mine")}
    installed = replace(registry(), adapters=replace(adapters, specs=specs))
    with pytest.raises(AptError, match="^typo:Mine of 'llama' does not load: No module named"):
        open_skeleton(find(str(checkpoint("llama")), installed), installed)


def test_a_shell_holds_no_weights(checkpoint):
    skeleton = open_skeleton(find(str(checkpoint("bloom")), registry()), registry())
    assert {p.device.type for p in skeleton.module.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("zoo:lama", "did you mean 'llama'"),
        ("./nowhere", "no such model"),
        ("/nowhere/at/all", "no such model"),
        ("nowhere.gguf", "no such model"),
    ],
)
def test_what_is_not_there_is_named(reference, message):
    with pytest.raises(AptError, match=message):
        find(reference, registry())


def test_a_near_miss_is_suggested(damaged):
    with pytest.raises(AptError, match=r"did you mean '.*model'"):
        find(f"{damaged}l", registry())


def test_a_directory_without_a_config_is_no_model(tmp_path):
    with pytest.raises(AptError, match=r"has no config\.json"):
        find(str(tmp_path), registry())


def test_a_truncated_checkpoint_is_one_line(damaged):
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(AptError, match="is damaged") as caught:
        loaded(damaged)
    assert "\n" not in str(caught.value)


def test_missing_weights_are_never_made_up(damaged):
    weights = load_file(damaged / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(AptError, match=r"lacks 1 weights .*model\.layers\.1\.mlp\.up_proj"):
        loaded(damaged)


def test_weights_that_are_not_finite_are_named(damaged):
    weights = load_file(damaged / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][1, 2] = float("nan")
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(AptError, match=r"model\.layers\.2\.mlp\.down_proj\.weight .*not finite"):
        loaded(damaged)


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


@pytest.mark.parametrize("payload", [True, False], ids=["code", "tensors"])
def test_pickles_load_only_if_they_hold_nothing_but_tensors(damaged, payload, monkeypatch):
    monkeypatch.chdir(damaged)
    weights = load_file("model.safetensors")
    Path("model.safetensors").unlink()
    if payload:
        weights["x"] = Payload()
    torch.save(weights, "pytorch_model.bin", pickle_module=pickle)
    if not payload:
        assert loaded(damaged).module.config.model_type == "llama"
        return
    with pytest.raises(AptError, match="pickled and has objects other than tensors"):
        loaded(damaged)
    assert not Path("pwned").exists()


def test_remote_code_is_off(damaged):
    config = json.loads((damaged / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}
    (damaged / "config.json").write_text(json.dumps(config))
    (damaged / "theirs.py").write_text("open('pwned', 'w')")
    with pytest.raises(AptError, match="read that code, then allow it"):
        loaded(damaged)
    assert not (damaged / "pwned").exists()


@pytest.mark.parametrize("text", ["", "{", '{"model_type": "no_such_type"}', "[]"])
def test_configs_that_are_none(damaged, text):
    (damaged / "config.json").write_text(text)
    with pytest.raises(AptError) as caught:
        loaded(damaged)
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_of_a_family_that_makes_an_empty_one(checkpoint, tmp_path):
    shutil.copytree(checkpoint("mamba"), tmp_path, dirs_exist_ok=True)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(AptError, match="no tokenizer that loads"):
        load_tokenizer(find(str(tmp_path), registry()))


def test_a_missing_tokenizer_is_one_line(damaged):
    for file in damaged.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(AptError, match="no tokenizer"):
        load_tokenizer(find(str(damaged), registry()))


def test_a_fingerprint_changes_with_any_weight(damaged):
    model = AutoModelForCausalLM.from_pretrained(damaged)
    before = fingerprint(model)
    assert fingerprint(AutoModelForCausalLM.from_pretrained(damaged)) == before
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    assert fingerprint(model) != before


def test_a_shape_that_is_not_the_configurations_is_named(damaged):
    weights = load_file(damaged / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name][:-3].contiguous()
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(AptError, match=rf"{name} of .*, but \(64, 32\) by its conf"):
        loaded(damaged)


def test_weights_beyond_float16_are_told_from_damage(damaged):
    weights = load_file(damaged / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][1, 2] = 1e9
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    assert loaded(damaged).dtype == torch.float32
    with pytest.raises(AptError, match=r"down_proj\.weight .* beyond 65,504, the largest of float"):
        loaded(damaged, dtype=torch.float16)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": ["llama"]}, "a list or an object where a single value belongs"),
        ({"hidden_act": "sillu"}, "'sillu' is missing or unknown"),
        ({"num_attention_heads": 0}, "modulo by zero"),
        ({"dtype": "float99"}, "AttributeError: module 'torch' has no attribute 'float99'"),
    ],
    ids=str,
)
def test_damaged_configurations_are_told_by_what_is_wrong(edited, fields, said):
    with pytest.raises(AptError) as caught:
        loaded(edited("llama", **fields))
    assert said in str(caught.value)
    assert str(caught.value).endswith("is its config.json damaged?")


def test_a_wrong_configuration_is_not_taken_for_a_wrong_index(damaged):
    in_several_files(damaged)
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"hidden_act": "sillu"}))
    with pytest.raises(AptError, match="'sillu' is missing or unknown; is its config.json damaged"):
        loaded(damaged)


def in_several_files(directory, **index):
    name = "model-00001-of-00001.safetensors"
    (directory / "model.safetensors").rename(directory / name)
    names = dict.fromkeys(load_file(directory / name), name)
    index = {"metadata": {}, "weight_map": names, **index}
    known = {key: value for key, value in index.items() if value is not None}
    (directory / "model.safetensors.index.json").write_text(json.dumps(known))


@pytest.mark.parametrize("lacking", ["weight_map", "metadata"])
def test_an_index_that_lacks_an_entry_is_named(damaged, lacking):
    in_several_files(damaged, **{lacking: None})
    with pytest.raises(AptError, match=rf"index\.json has no '{lacking}'"):
        loaded(damaged)


def test_a_configuration_that_is_nested_too_deeply_is_one_line(damaged):
    (damaged / "config.json").write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(AptError, match="a JSON file of it is nested too deeply"):
        loaded(damaged)


def test_a_tokenizer_with_code_of_its_own_is_told(damaged):
    path = damaged / "tokenizer_config.json"
    code = {"auto_map": {"AutoTokenizer": ["theirs.Tokenizer", None]}, "tokenizer_class": "Theirs"}
    path.write_text(json.dumps(json.loads(path.read_text()) | code))
    with pytest.raises(AptError, match=r"the tokenizer of .* needs code .*then allow it"):
        load_tokenizer(find(str(damaged), registry()))
