"""Loading of models from every source, and the errors for damaged checkpoints."""

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
def test_zoo_models_load_in_bfloat16(name):
    model = loaded(f"zoo:{name}")
    assert model.spec.name == name
    assert next(model.module.parameters()).dtype == torch.bfloat16
    assert model.source.name == name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_directory_loads_in_its_stored_or_the_requested_dtype(checkpoint, dtype):
    path = checkpoint("opt-350m", dtype=dtype)
    assert next(loaded(path).module.parameters()).dtype == dtype
    assert next(loaded(path, dtype=torch.float32).module.parameters()).dtype == torch.float32


def test_adapter_that_does_not_import_is_an_error_of_one_line(checkpoint):
    adapters = registry().adapters
    specs = {**adapters.specs, "llama": replace(adapters.get("llama"), target="typo:Mine")}
    installed = replace(registry(), adapters=replace(adapters, specs=specs))
    with pytest.raises(AptError, match="^typo:Mine of 'llama' does not load: No module named"):
        open_skeleton(find(str(checkpoint("llama")), installed), installed)


def test_skeleton_has_all_parameters_on_the_meta_device(checkpoint):
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
def test_unknown_reference_is_an_error_with_a_reason(reference, message):
    with pytest.raises(AptError, match=message):
        find(reference, registry())


def test_misspelled_directory_gets_a_suggestion(damaged):
    with pytest.raises(AptError, match=r"did you mean '.*model'"):
        find(f"{damaged}l", registry())


def test_directory_without_a_config_is_refused(tmp_path):
    with pytest.raises(AptError, match=r"has no config\.json"):
        find(str(tmp_path), registry())


def test_truncated_checkpoint_is_an_error_of_one_line(damaged):
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(AptError, match="is damaged") as caught:
        loaded(damaged)
    assert "\n" not in str(caught.value)


def test_missing_weight_is_an_error_with_its_name(damaged):
    weights = load_file(damaged / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(AptError, match=r"lacks 1 weights .*model\.layers\.1\.mlp\.up_proj"):
        loaded(damaged)


def test_weight_that_is_not_finite_is_an_error_with_its_name(damaged):
    weights = load_file(damaged / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][1, 2] = float("nan")
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(AptError, match=r"model\.layers\.2\.mlp\.down_proj\.weight .*not finite"):
        loaded(damaged)


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


@pytest.mark.parametrize("payload", [True, False], ids=["code", "tensors"])
def test_pickle_with_objects_other_than_tensors_is_refused(damaged, payload, monkeypatch):
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


def test_remote_code_is_refused_and_not_run(damaged):
    config = json.loads((damaged / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}
    (damaged / "config.json").write_text(json.dumps(config))
    (damaged / "theirs.py").write_text("open('pwned', 'w')")
    with pytest.raises(AptError, match="read that code, then allow it"):
        loaded(damaged)
    assert not (damaged / "pwned").exists()


@pytest.mark.parametrize("text", ["", "{", '{"model_type": "no_such_type"}', "[]"])
def test_invalid_config_is_an_error_of_one_line(damaged, text):
    (damaged / "config.json").write_text(text)
    with pytest.raises(AptError) as caught:
        loaded(damaged)
    assert "\n" not in str(caught.value)


def test_missing_tokenizer_of_mamba_is_an_error(checkpoint, tmp_path):
    shutil.copytree(checkpoint("mamba"), tmp_path, dirs_exist_ok=True)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(AptError, match="no tokenizer that loads"):
        load_tokenizer(find(str(tmp_path), registry()))


def test_missing_tokenizer_is_an_error(damaged):
    for file in damaged.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(AptError, match="no tokenizer"):
        load_tokenizer(find(str(damaged), registry()))


def test_fingerprint_changes_with_a_weight(damaged):
    model = AutoModelForCausalLM.from_pretrained(damaged)
    before = fingerprint(model)
    assert fingerprint(AutoModelForCausalLM.from_pretrained(damaged)) == before
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    assert fingerprint(model) != before


def test_stored_shape_that_differs_from_the_config_is_an_error(damaged):
    weights = load_file(damaged / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name][:-3].contiguous()
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(AptError, match=rf"{name} of .*, but \(64, 32\) by its conf"):
        loaded(damaged)


def test_weight_beyond_float16_has_an_error_of_its_own(damaged):
    weights = load_file(damaged / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][1, 2] = 1e9
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    assert loaded(damaged).dtype == torch.float32
    with pytest.raises(AptError, match=r"down_proj\.weight .* beyond 65,504, the largest of float"):
        loaded(damaged, dtype=torch.float16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": ["llama"]}, "a list or an object where a single value belongs"),
        ({"hidden_act": "sillu"}, "'sillu' is missing or unknown"),
        ({"num_attention_heads": 0}, "modulo by zero"),
        ({"dtype": "float99"}, "AttributeError: module 'torch' has no attribute 'float99'"),
    ],
    ids=str,
)
def test_damaged_config_is_an_error_with_the_cause(edited, fields, message):
    with pytest.raises(AptError) as caught:
        loaded(edited("llama", **fields))
    assert message in str(caught.value)
    assert str(caught.value).endswith("is its config.json damaged?")


def test_wrong_config_beside_an_index_is_reported_as_wrong_config(damaged):
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
    entries = {key: value for key, value in index.items() if value is not None}
    (directory / "model.safetensors.index.json").write_text(json.dumps(entries))


@pytest.mark.parametrize("lacking", ["weight_map", "metadata"])
def test_index_without_an_entry_is_an_error_with_its_name(damaged, lacking):
    in_several_files(damaged, **{lacking: None})
    with pytest.raises(AptError, match=rf"index\.json has no '{lacking}'"):
        loaded(damaged)


def test_deeply_nested_config_is_an_error(damaged):
    (damaged / "config.json").write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(AptError, match="a JSON file of it is nested too deeply"):
        loaded(damaged)


def test_tokenizer_with_code_in_its_repository_asks_to_allow_the_code(damaged):
    path = damaged / "tokenizer_config.json"
    code = {"auto_map": {"AutoTokenizer": ["theirs.Tokenizer", None]}, "tokenizer_class": "Theirs"}
    path.write_text(json.dumps(json.loads(path.read_text()) | code))
    with pytest.raises(AptError, match=r"the tokenizer of .* needs code .*then allow it"):
        load_tokenizer(find(str(damaged), registry()))
