"""Checkpoints for compressed-tensors: they open in plain transformers with the same values."""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from apt.packing.compressed_tensors import packed, unpacked
from tests.helpers import TEXT

RUN = ("--sparsity", 0.6, "--samples", 4, "--seqlen", 64, "--calibration", TEXT, "--effort", "fast")
EXPORT = ("--format", "compressed-tensors")
WINDOWS = ("--samples", 2, "--seqlen", 64, "--json")


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 200), st.sampled_from([4, 8]), st.integers(0, 99))
def test_packed_integers_equal_those_of_compressed_tensors(rows, columns, bits, seed):
    draw = torch.Generator().manual_seed(seed)
    most = 2 ** (bits - 1) - 1
    integers = torch.randint(-most, most + 1, (rows, columns), generator=draw, dtype=torch.int8)
    words = packed(integers, bits)
    assert torch.equal(unpacked(words, bits, columns), integers)
    assert torch.equal(unpack_from_int32(words, bits, integers.shape), integers)
    theirs = pack_to_int32(integers, bits)
    assert torch.equal(words[:, : theirs.shape[1]], theirs[:, : words.shape[1]])


@pytest.fixture
def pruned(apt):
    """A directory with weights in int4, groups of 64."""
    run = apt("prune", "zoo:llama", *RUN, "--quantize", "int4", "--scale-group", 64, "-o", "pruned")
    assert run.code == 0, run.err
    return Path("pruned")


def logits(directory):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    with torch.no_grad():
        return model(torch.arange(60).view(2, 30)).logits


def test_exported_model_gives_the_same_logits_in_transformers(apt, pruned):
    run = apt("pack", pruned, *EXPORT, "-o", "out", "--json")
    assert run.code == 0, run.err
    record = json.loads(run.out)
    assert record["relative_error"] == 0
    assert record["packed_bytes"] < 0.28 * record["dense_bytes"]  # 4 of 16 bits, and scales
    about = json.loads(Path("out/config.json").read_text())["quantization_config"]
    assert about["quant_method"] == "compressed-tensors"
    assert about["ignore"] == ["lm_head"]
    assert torch.equal(logits("pruned"), logits("out"))
    figures = [
        json.loads(apt("eval", name, *WINDOWS, "--compute", "bfloat16").out)["perplexity"]
        for name in ("pruned", "out")
    ]
    assert figures[0] == figures[1]


def test_rounding_on_export_keeps_the_zeros(apt):
    assert apt("prune", "zoo:opt", *RUN, "-o", "pruned").code == 0
    for kind, least in (("int8", 1e-4), ("int4", 2e-2)):
        run = apt(
            "pack", "pruned", *EXPORT, "--quantize", kind, "--scale-group", 64, "-o", kind, "--json"
        )
        assert run.code == 0, run.err
        assert 0 < json.loads(run.out)["relative_error"] < least
        assert (logits("pruned") - logits(kind)).abs().max() < 3
    plain, made = load_file("pruned/model.safetensors"), load_file("int8/model.safetensors")
    name = next(name for name in plain if name.endswith("fc1.weight"))
    integers = unpacked(made[f"{name}_packed"], 8, plain[name].shape[1])
    assert not integers[plain[name] == 0].any()


def test_exported_model_can_be_measured_but_not_changed(apt, pruned, monkeypatch):
    # With torch 2.6 the kernels round the products of this model otherwise than torch does.
    monkeypatch.setattr("apt.runtime.linear.kernels", lambda: None)
    assert apt("pack", pruned, *EXPORT, "-o", "out").code == 0
    assert apt("pack", pruned, "-o", "packed").code == 0
    run = apt("compare", "zoo:llama", "--methods", "magnitude", "--patterns", "0.5", "--samples", 2,
              "--seqlen", 16, "--windows", 2, "--calibration", TEXT, "--data", TEXT,
              "--with", "out", "--with", "packed", "-o", "compared", "--json")  # fmt: skip
    assert run.code == 0, run.err
    *_, one, other = json.loads(run.out)["rows"]
    scores = [row["scores"][TEXT.name]["perplexity"] for row in (one, other)]
    assert scores[0] == pytest.approx(scores[1], rel=5e-3)  # products in fp32, or bf16
    for command in (("prune", "out", "-o", "x"), ("pack", "out", "-o", "x")):
        refused = apt(*command)
        assert refused.code == 2
        assert "is quantised with compressed-tensors" in refused.err
    Path("out/apt_report.json").unlink()
    unknown = apt("verify", "out", "--sparsity", 0.5)
    assert unknown.code == 2
    assert "is quantised with compressed-tensors, and has no report" in unknown.err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "compressed-tensors stores integers, and zoo:llama was not quantised"),
        (("--quantize", "int4"), "columns, which compressed-tensors needs; use 64 (--scale-group)"),
        (("--quantize", "int2"), "quantize 'int2' is not one of"),
        (("--format", "gguf"), "format 'gguf' is not one of apt, compressed-tensors (--format)"),
    ],
)
def test_wrong_arguments_are_errors_of_one_line(apt, arguments, text):
    run = apt("pack", "zoo:llama", *EXPORT, *arguments, "-o", "out")
    assert run.code == 2
    assert len(run.err.splitlines()) == 1
    assert text in run.err
    assert not Path("out").exists()
