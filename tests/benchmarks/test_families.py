"""The table of model types: rows made now, and what makes a row wrong."""

import json
import os
from importlib import import_module

import pytest
import torch
import transformers

from tests.helpers import ROOT
from tests.helpers.families import adapter_of

RESULTS = json.loads((ROOT / "benchmarks/results/families.json").read_text(encoding="utf-8"))
VERSION = RESULTS["versions"]["transformers"]
TABLE = {(row["type"], row["table"]): row for row in RESULTS["rows"]}
STRUCTURES = {
    "phi": "attention and MLP side by side",
    "qwen3_5_text": "a recurrence in linear attention",
    "deepseek_v3": "latent attention, then experts with one that is shared",
    "gpt_oss": "experts with biases, gate and up interleaved",
    "llama4_text": "every expert multiplied by every token",
    "nemotron_h": "blocks of one mixer each",
    "gemma4_text": "embeddings of each layer",
    "zaya": "blocks that pass more than the stream to each other",
    "jamba": "an adapter of its own",
    "hrm_text": "blocks that are called several times: refused",
    "zamba2": "weights that several blocks use: they stay dense",
    "gemma3n_text": "keys and values that a block leaves for later ones",
}
IMAGES = {
    "llava": "a language model beside a larger part for images",
    "llama4": "a class that does not run on text, around a language model that does",
    "mllama": "layers that look at an image: they stay dense",
}
OTHERS = {
    "bert": "an adapter of its own, one encoder",
    "bigbird_pegasus": "an encoder and a decoder that reads it",
    "swin": "stages of blocks, between which rows are merged",
    "flava": "three towers that are called one after the other",
    "nllb-moe": "experts in two stacks",
    "siglip2_vision_model": "patches of images, with their numbers",
    "wavlm": "products inside of torch's own function for attention",
    "albert": "one block that is called several times: refused",
}


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """The folder of the benchmarks, whose files import each other."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.mark.skipif(transformers.__version__ != VERSION, reason="the table is of another version")
@pytest.mark.parametrize("kind", STRUCTURES)
def test_row_of_a_family_equals_the_table(kind):
    assert import_module("families").row(kind, "causal") == TABLE[kind, "causal"]


@pytest.mark.skipif(transformers.__version__ != VERSION, reason="the table is of another version")
@pytest.mark.parametrize("kind", IMAGES)
def test_row_of_a_multimodal_family_equals_the_table(kind):
    assert import_module("families").row(kind, "image") == TABLE[kind, "image"]


@pytest.mark.skipif(transformers.__version__ != VERSION, reason="the table is of another version")
@pytest.mark.parametrize("kind", OTHERS)
def test_row_of_another_model_equals_the_table(kind):
    assert import_module("families").row(kind, "other") == TABLE[kind, "other"]


def test_table_has_every_type_and_the_page_its_version():
    tiny = import_module("tiny")
    if transformers.__version__ == VERSION:
        tables = {"causal": tiny.CAUSAL, "image": tiny.IMAGE, "other": tiny.other_types()}
        assert set(TABLE) == {(kind, table) for table, kinds in tables.items() for kind in kinds}
    assert f"transformers {VERSION}" in (ROOT / "docs/families.md").read_text(encoding="utf-8")


def test_changes_outside_the_sites_are_detected(monkeypatch):
    families, tiny = import_module("families"), import_module("tiny")
    prune = families.apt.prune

    def careless(model, *args, **options):
        prune(model, *args, **options)
        model.model.norm.weight.data[0] += 1e-3
        model.model.layers[1].mlp.down_proj.weight.data[0, 0] = 0.0
        model.model.layers[1].mlp.down_proj.weight.data[0, 1] = 0.0
        model.model.layers[1].mlp.down_proj.weight.data[0, 2] = 0.0

    monkeypatch.setattr(families.apt, "prune", careless)
    model = tiny.model("llama")
    found = families.pruned(model, adapter_of(model), families.inputs_for(model))
    assert (found["exact"], found["untouched"]) == (False, False)


def test_run_goes_on_behind_the_rows_of_a_file(monkeypatch, tmp_path, capsys):
    families = import_module("families")
    rows = tmp_path / "rows.jsonl"
    kept = {"type": "bert", "table": "other", "adapter": "", "reason": "kept", "served": "refused"}
    rows.write_text(json.dumps(kept) + "\n")
    command = ["--only", "bert", "fnet", "--tables", "other", "--rows", str(rows)]
    monkeypatch.setattr("sys.argv", ["families.py", *command])
    families.main()
    assert [json.loads(line)["type"] for line in rows.read_text().splitlines()] == ["bert", "fnet"]
    bert, fnet = capsys.readouterr().out.splitlines()
    assert "kept" in bert
    assert "auto" in fnet


def test_crash_of_a_process_is_the_reason_in_its_row(monkeypatch):
    families = import_module("families")
    monkeypatch.setattr(families, "row", lambda kind, table: os._exit(1))
    assert families.guarded("llama", "causal")["reason"] == "its process has crashed"


def test_timeout_of_a_model_is_the_reason_in_its_row(monkeypatch):
    families = import_module("families")
    monkeypatch.setattr(families, "SECONDS", 0.1)
    monkeypatch.setattr(families.tiny, "model", lambda kind, image: endless())
    found = families.row("llama", "causal")
    assert (found["served"], found["reason"]) == ("not built", "not done after 0.1 s")


def endless():
    """Multiply until an alarm ends it."""
    x = torch.eye(2)
    while True:
        x = x @ x
