"""``apt-prune fit --for vllm``: a directory of compressed-tensors of a given size."""

import json
from itertools import groupby
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from apt import AptError, FitRun, run
from apt.checkpoints.safetensors_io import Shards
from apt.packing.compressed_tensors import dequantized, unpacked
from apt.runtime.rounding import BITS

SMALL = {"samples": 4, "seqlen": 32, "target": "vllm"}


SHAPE = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, tokenizer):
    """A small random model in 605 kB, as a directory for vLLM, and its report."""
    folder = tmp_path_factory.mktemp("vllm")
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SHAPE, vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    options = {"size": "605kB", "may": "bits", "output": folder / "a", **SMALL}
    return folder / "a", run(FitRun(model=str(folder / "model"), **options))


def test_weights_are_at_most_the_budget_and_near_it(fitted):
    place, report = fitted
    written = (place / "model.safetensors").stat().st_size
    assert 595_000 < written == report.fit["size"] <= 605_000
    assert 0 <= report.fit["expected"] - written < 4_000  # of the header


def test_matrices_with_one_input_have_one_level(fitted):
    _, report = fitted
    levels = report.fit["levels"]
    assert {"int4"} < set(levels.values()) <= {"int4", "int8", "bfloat16"}
    fused = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "up", "up_proj": "up"}

    def product(name):
        block, kind = name.split(".")[2], name.split(".")[-2]
        return block, fused.get(kind, kind)

    for _, names in groupby(sorted(levels, key=product), key=product):
        assert len({levels[name] for name in names}) == 1


def test_config_names_the_modules_of_each_kind(fitted):
    place, report = fitted
    config = json.loads((place / "config.json").read_text("utf-8"))["quantization_config"]
    assert config["format"] == "pack-quantized"
    assert config["ignore"] == ["lm_head"]
    kinds = {
        f"{target}.weight": f"int{group['weights']['num_bits']}"
        for group in config["config_groups"].values()
        for target in group["targets"]
    }
    levels = report.fit["levels"]
    assert kinds == {name: level for name, level in levels.items() if level != "bfloat16"}


def test_transformers_computes_with_the_integers(fitted):
    pytest.importorskip("compressed_tensors")
    place, report = fitted
    ids, shards = torch.arange(3, 35)[None], Shards(place)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16)
    with torch.no_grad():
        found = model(ids).logits
    config = AutoConfig.from_pretrained(place)
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    integers = {name: kind for name, kind in report.fit["levels"].items() if kind in BITS}
    for name, parameter in plain.named_parameters():
        if name not in integers:
            parameter.data.copy_(shards.read(name))
            continue
        parts = {part: shards.read(f"{name}_{part}") for part in ("packed", "scale", "shape")}
        assert parts["shape"].tolist() == list(parameter.shape)
        values = unpacked(parts["packed"], BITS[integers[name]], parameter.shape[1])
        parameter.data.copy_(dequantized(values, parts["scale"]))
    with torch.no_grad():
        assert torch.equal(found, plain(ids).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "1MB", "may": "bits"}, "its smallest directory for vLLM has"),
        ({"size": "100MB"}, "fits already"),
        ({"size": "1.7MB", "scale_group": 320}, "multiple of the scale group"),
        ({"size": "1.7MB", "may": "zeros,bits"}, "fit has no zeros to choose for vllm"),
        ({"memory": "1.7MB"}, "memory has no effect for vllm"),
        ({"size": "1.7MB", "output": Path("a.gguf")}, "a.gguf is the name of a file"),
    ],
)
def test_bad_options_are_named_before_any_work(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    given = {"output": Path("a"), **options}
    with pytest.raises(AptError, match=message):
        run(FitRun(model="zoo:llama", **given, **SMALL))
    assert not list(tmp_path.iterdir())
