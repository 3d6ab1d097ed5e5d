"""Runs with a sparsity of 0: no weight is removed, and the weights become integers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apt.engine.packing import integers_of
from apt.runtime.rounding import exact_integers
from tests.helpers import TEXT

SHORT = ("--samples", 4, "--seqlen", 64, "--calibration", TEXT)
INT4 = ("--sparsity", 0, "--quantize", "int4", "--scale-group", 32)


def matrices(directory):
    """The matrices of the blocks."""
    stored = load_file(Path(directory) / "model.safetensors")
    return {k: v for k, v in stored.items() if ".layers." in k and v.ndim == 2}


@pytest.fixture(scope="module")
def sparse(output_of):
    """The embedded LLaMA with half of its weights zero."""
    return output_of("prune", "zoo:llama", "--pattern", "2:4", "--method", "wanda", *SHORT)


@pytest.mark.parametrize("how", [("--effort", "default"), ("--layer-wise",), ("--method", "wanda")])
def test_rounding_keeps_all_zeros_of_a_pruned_model(apt, sparse, how):
    run = apt("prune", sparse, *INT4, *SHORT, *how, "-o", "out")
    assert run.code == 0, run.err
    before, after = matrices(sparse), matrices("out")
    for name, weight in before.items():
        assert exact_integers(after[name], "int4", 32) is not None, name
        assert not after[name][weight == 0].any(), name
        assert not torch.equal(after[name], weight), name
    assert apt("verify", "out").code == 0
    assert apt("verify", "out", "--pattern", "2:4", "--at-least").code == 0
    options = json.loads(Path("out/apt_report.json").read_text())["options"]
    assert (options["pattern"], options["allocation"]) == ("0", "uniform")


def test_smaller_model_is_rounded_after_its_training(apt, checkpoint):
    assert apt("shrink", checkpoint("llama"), "--blocks", 1, *SHORT, "-o", "small").code == 0
    assert apt("prune", "small", *INT4, *SHORT, "-o", "out", "--pack", "packed").code == 0
    assert all(exact_integers(w, "int4", 32) is not None for w in matrices("out").values())


def test_model_trained_after_rounding_has_no_integers(apt, sparse):
    assert apt("prune", sparse, *INT4, *SHORT, "-o", "out").code == 0
    assert integers_of(Path("out")).kind == "int4"
    path = Path("out/apt_report.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "recovery": {"steps": 1}}))
    assert integers_of(Path("out")) is None


def test_sparsity_of_0_without_integers_is_refused(apt, sparse):
    run = apt("prune", sparse, *INT4[:2])
    assert run.code == 2
    assert "nothing would be pruned" in run.err
    assert "give a larger sparsity, or quantize (--sparsity, --quantize)" in run.err


def test_override_with_sparsity_0_keeps_the_zeros_of_a_site(apt, sparse):
    run = apt("prune", sparse, "--sparsity", 0.6, "--override", "*.v_proj=0", *SHORT, "-o", "out",
              "--effort", "fast")  # fmt: skip
    assert run.code == 0, run.err
    before, after = matrices(sparse), matrices("out")
    assert "4 of 28 sites lose no weight" in run.err
    for name in (name for name in before if "v_proj" in name):
        assert torch.equal(after[name] == 0, before[name] == 0)
        moved = not torch.equal(after[name], before[name])
        assert moved == ("layers.0" not in name)  # the first one has inputs without an error
