"""Smaller models of quantised checkpoints: the stored bytes of what is kept, and nothing else."""

import json
import shutil
import signal
import sys
from importlib.metadata import EntryPoint, entry_points

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from apt.plugin import registry as registries
from apt.plugin.registry import load_registry
from tests.helpers import row_bytes
from tests.helpers.mixtures import mixture
from tests.helpers.row_bytes import FILE, write_model

SMALL = ("--samples", 4, "--seqlen", 16)


@pytest.fixture(autouse=True)
def _with_format(monkeypatch):
    """APT with the format of a third party."""
    entry = EntryPoint("row-bytes", row_bytes.__name__, "apt")
    registry = load_registry([*entry_points(group="apt"), entry])
    monkeypatch.setattr(registries, "registry", lambda: registry)
    for module in list(sys.modules.values()):
        if getattr(module, "registry", None) is registries_registry:
            monkeypatch.setattr(module, "registry", lambda: registry)


registries_registry = registries.registry


@pytest.fixture
def quantised(tmp_path, tokenizer):
    """A function that writes a random mixture of a family in the format."""

    def make(family, **sizes):
        model = mixture(family, vocab_size=2048, num_hidden_layers=3, **sizes)
        folder = tmp_path / family
        tokenizer.save_pretrained(folder)
        return write_model(model, folder)

    return make


def stored(directory):
    return load_file(directory / FILE)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text"])
def test_kept_experts_have_their_bytes(family, quantised, apt, tmp_path):
    model = quantised(family)
    result = apt("shrink", model, "--size", "experts=4", *SMALL, "-o", "small")
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "small" / "apt_report.json").read_text())
    assert report["structure"]["rounded"] == {}
    whole, small = stored(model), stored(tmp_path / "small")
    removed = report["structure"]["experts"]
    assert removed
    print(list(small), removed)
