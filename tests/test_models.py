"""Loading: every source, and every way in which a checkpoint can be bad."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from apt.errors import AptError
from apt.models import find, fingerprint, load, load_tokenizer, skeleton
from apt.plugins import registry
from tests.families import FAMILIES


def loaded(reference, **options):
    return load(skeleton(find(str(reference), registry()), registry()), **options)


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


def test_a_skeleton_holds_no_weights(checkpoint):
    shell = skeleton(find(str(checkpoint("bloom")), registry()), registry())
    assert {p.device.type for p in shell.module.parameters()} == {"meta"}


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
    with pytest.raises(AptError, match="does not load") as caught:
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
    with pytest.raises(AptError, match="pickled and holds more than tensors"):
        loaded(damaged)
    assert not Path("pwned").exists()


def test_remote_code_is_off(damaged):
    config = json.loads((damaged / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}
    (damaged / "config.json").write_text(json.dumps(config))
    (damaged / "theirs.py").write_text("open('pwned', 'w')")
    with pytest.raises(AptError, match="--trust-remote-code"):
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
