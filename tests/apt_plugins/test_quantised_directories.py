"""Directories of quantised safetensors files: expanded, and sliced byte by byte."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    Mxfp4Config,
)

from apt.locations.model_source import Source
from apt.output.report import Report
from tests.helpers.quantised_directories import MADE, removed_by_hand, slices_of, write

opening = pytest.importorskip("apt_plugins.quantised_directories.opening")

KEPT = {0: [1, 2, 5, 7], 1: [0, 1, 2, 3], 2: [0, 3, 4, 6]}
BLOCKS = [0, 2]


def opened(directory):
    return opening.open_directory(Source(str(directory), str(directory)))


def stored(directory):
    """All stored tensors of a directory."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def as_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    return path


@pytest.mark.parametrize("kind", MADE)
def test_a_smaller_model_has_the_stored_bytes_of_its_sources(kind, directory, tmp_path):
    made = write(kind, directory)
    checkpoint = opened(directory)
    slices = slices_of(checkpoint, made, KEPT, BLOCKS)
    checkpoint.write_sliced(slices, tmp_path / "small")
    small = opened(tmp_path / "small")
    assert small.tensors.keys() == slices.sources.keys()
    for name, source in slices.sources.items():
        whole = checkpoint.read(source)
        expected = whole[slices.rows[name]] if name in slices.rows else whole
        assert torch.equal(small.read(name), expected), name
    old, new = stored(directory), stored(tmp_path / "small")
    for key, tensor in new.items():
        source = old[original(key)]
        if tensor.shape != source.shape:
            source = source[KEPT[BLOCKS[int(key.split(".")[2])]]]
        assert tensor.dtype == source.dtype
        assert torch.equal(as_bytes(tensor), as_bytes(source)), key
    blocks, experts = (re.compile(rf"{word}\.(\d+)\.") for word in ("layers", "experts"))
    assert {int(n) for key in new for n in blocks.findall(key)} == {0, 1}
    assert {int(n) for key in new for n in experts.findall(key)} <= {0, 1, 2, 3}
    assert index_of(tmp_path / "small").keys() == new.keys()


def original(key):
    """The name in the checkpoint of a stored tensor of the smaller model."""
    parts = key.split(".")
    if "layers" in parts:
        block = BLOCKS[int(parts[2])]
        parts[2] = str(block)
        if "experts" in parts and parts[parts.index("experts") + 1].isdigit():
            at = parts.index("experts") + 1
            parts[at] = str(KEPT[block][int(parts[at])])
    return ".".join(parts)


def index_of(directory):
    """The file of each tensor, which has it."""
    files = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in files.items():
        with safe_open(directory / file, "pt") as opened_file:
            assert name in opened_file.keys()  # noqa: SIM118
    return files


def plain_model(tensors, config, path):
    """A model of transformers with these weights, through a plain checkpoint."""
    path.mkdir()
    config.save_pretrained(path)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)


def own_reader(kind, directory):
    """The model as transformers opens the quantised directory on a CPU."""
    if kind.startswith("compressed"):
        pytest.importorskip("compressed_tensors")
        about = CompressedTensorsConfig(dequantize=True)
    else:
        about = (Mxfp4Config if kind == "mxfp4" else FineGrainedFP8Config)(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=about, dtype=torch.bfloat16
    )


def assert_same(one, other):
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name].to(tensor.dtype)), name
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(one(ids).logits, other(ids).logits)


@pytest.mark.parametrize(
    "kind", ["fp8", "fp8-deepseek", "mxfp4", "compressed-int4", "compressed-fp8"]
)
def test_transformers_reads_the_same_weights_before_and_after(kind, directory, tmp_path):
    made = write(kind, directory)
    checkpoint = opened(directory)
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    whole = plain_model(tensors, checkpoint.config, tmp_path / "plain")
    assert_same(whole, own_reader(kind, directory))
    slices = slices_of(checkpoint, made, KEPT, BLOCKS)
    checkpoint.write_sliced(slices, tmp_path / "small")
    by_hand = removed_by_hand(checkpoint, slices)
    expected = plain_model(by_hand, slices.config, tmp_path / "by_hand")
    assert_same(expected, own_reader(kind, tmp_path / "small"))


@pytest.mark.parametrize("kind", MADE)
def test_a_run_removes_experts_and_a_block(kind, directory, tmp_path, tokenizer, apt):
    tokenizer.save_pretrained(directory)
    made = write(kind, directory, vocab_size=2048)
    small = tmp_path / "small"
    options = ("--size", "experts=4", "--drop", 1, "--samples", 4, "--seqlen", 16)
    result = apt("shrink", directory, *options, "-o", small)
    assert result.code == 0, result.err
    structure = Report.read(small).structure
    assert structure["rounded"] == {}
    assert structure["groups"]["experts"] == {"kept": 4, "of": 8}
    removed = {int(n.rpartition(".")[2]): x["removed"] for n, x in structure["experts"].items()}
    kept = {block: [e for e in range(8) if e not in removed.get(block, ())] for block in BLOCKS}
    whole, after = opened(directory), opened(small)
    slices = slices_of(whole, made, kept, BLOCKS)
    for name, tensor in removed_by_hand(whole, slices).items():
        assert torch.equal(after.read(name), tensor), name
    assert (small / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
