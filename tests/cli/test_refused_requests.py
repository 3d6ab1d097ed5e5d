"""Impossible requests are refused before the work, and the hint names the option to change."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import apt as library
from apt.checkpoints.masks import read_masks, write_masks
from apt.output.location import check_space
from tests.helpers import ROOT, TEXT
from tests.helpers.mounting import mounted

SMALL = ("--samples", 2, "--seqlen", 16, "--calibration", TEXT)
PRUNE = ("prune", "m", *SMALL, "--method", "wanda", "-o", "out")
SHRINK = ("shrink", "m", *SMALL, "-o", "out")
REFUSED = [
    ((*PRUNE, "--sparsity", 0.9999999), "would lose all of", "--sparsity, --skip"),
    ((*PRUNE, "--sparsity", 0.99, "--per", "row"), "would lose all of", "--sparsity, --skip"),
    ((*PRUNE, "--sparsity", 0), "or quantize", "--sparsity, --quantize"),
    ((*PRUNE, "--pattern", "1:1000000"), "choose another pattern, or skip", "--pattern, --skip"),
    (
        (*PRUNE, "--sparsity", 0.5, "--allocation", "auto", "--override", "*=0.3"),
        "leave it out, or leave some sites to a sparsity",
        "--allocation, --sparsity, --override",
    ),
    ((*PRUNE, "--minutes", "1e308"), "it is a time in minutes", "--minutes"),
    ((*PRUNE, "--pack", "m"), "m is an input of the run", "--pack"),
    ((*PRUNE, "--export", "b.gguf", "-o", "fd.gguf"), "fd.gguf is a directory", "--output"),
    ((*SHRINK, "--size", "heads=99"), "heads can be 1 to 4, not 99", "--size"),
    ((*SHRINK, "--size", "heads=4"), "nothing would be removed", "--size"),
    ((*SHRINK, "--blocks", 3), "nothing would be removed", "--blocks"),
    ((*SHRINK, "--size", "rooms=3"), "the model has no rooms to remove", "--size"),
    (("prune", "bad.gguf", *SMALL, "-o", "out"), "get the file again: it is damaged", ""),
    (
        ("reapply", "m/model.safetensors", "m", "-o", "out"),
        "it has tensors of another kind; name the directory of a pruned model",
        "",
    ),
]


@pytest.mark.parametrize(("words", "message", "flags"), REFUSED, ids=lambda value: str(value)[-40:])
def test_error_names_the_option_to_change(apt, checkpoint, words, message, flags):
    shutil.copytree(checkpoint("llama"), "m")
    Path("bad.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 200)
    run = apt(*words)
    assert run.code == 2
    assert message in run.err
    assert run.err.rstrip().endswith(f"({flags})" if flags else "")
    assert not Path("out").exists()
    assert not Path("fd.gguf").exists()


def test_inspect_accepts_a_sparsity_of_0(apt, checkpoint):
    run = apt("inspect", checkpoint("llama"), "--sparsity", 0)
    assert run.code == 0, run.err


def test_rounded_share_of_groups_is_a_notice(apt, checkpoint):
    run = apt("shrink", checkpoint("llama"), *SMALL, "--size", "heads=0.4", "-o", "out")
    assert run.code == 0, run.err
    assert "heads: 2 of 4, the nearest to 0.4" in run.err
    exact = apt("shrink", checkpoint("llama"), *SMALL, "--size", "heads=0.5", "-o", "other")
    assert "the nearest" not in exact.err


def test_gguf_file_without_its_package_names_the_extra(apt, monkeypatch):
    Path("bad.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("apt.checkpoints.load_errors.find_spec", lambda name: None)
    run = apt("prune", "bad.gguf", *SMALL, "-o", "out")
    assert run.code == 2
    assert "needs the package gguf and accelerate; pip install 'apt-prune[gguf]'" in run.err


@pytest.mark.parametrize(("option", "where"), [("pack", "full/p"), ("export", "full/m.gguf")])
def test_too_little_space_for_a_copy_is_an_error_before_the_run(
    apt, checkpoint, tmp_path, option, where
):
    model = checkpoint("llama")
    with mounted(tmp_path / "full", "-o", "size=1M"):
        run = apt("prune", model, *SMALL, "--method", "wanda", "-o", "out", f"--{option}", where)
    assert run.code == 2
    assert f"the {option} needs" in run.err
    assert run.err.rstrip().endswith(f"(--{option})")
    assert not Path("out").exists()


def test_outputs_on_one_disk_need_the_sum_of_their_sizes(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    some = free * 2 // 3
    check_space({"output": (tmp_path / "a", some)})
    with pytest.raises(library.AptError, match="the output and the pack need") as refused:
        check_space({"output": (tmp_path / "a", some), "pack": (tmp_path / "b", some)})
    assert refused.value.options == ("output", "pack")


def test_closed_standard_output_of_a_process_is_status_1():
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "adapters", ROOT / "plugins")))
    command = f"{sys.executable} -m apt methods >&-"
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "cannot write to standard output: Bad file descriptor" in done.stderr


def changed(path, target):
    """Write masks with one changed bit and the checksum of the original masks."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        entries = file.metadata()
    tensors["a.weight"][0] ^= 1
    save_file(tensors, target, entries)
    return tensors, json.loads(entries["apt_masks"])


def test_changed_masks_are_refused_and_early_masks_are_read(tmp_path):
    masks = {"a.weight": torch.arange(64).view(8, 8) % 3 == 0}
    write_masks(masks, tmp_path / "masks", {"a": range(8)})
    assert torch.equal(read_masks(tmp_path / "masks")["a.weight"], masks["a.weight"])
    tensors, metadata = changed(tmp_path / "masks", tmp_path / "changed")
    with pytest.raises(library.AptError, match="it was changed since it was written"):
        read_masks(tmp_path / "changed")
    orders = metadata | {"orders": json.dumps({"a": [1, 0, *range(2, 8)]})}
    save_file(tensors, tmp_path / "changed", {"apt_masks": json.dumps(orders)})
    with pytest.raises(library.AptError, match="it was changed since it was written"):
        read_masks(tmp_path / "changed")
    del metadata["sha256"]
    save_file(tensors, tmp_path / "early", metadata)
    assert read_masks(tmp_path / "early")["a.weight"].shape == (8, 8)
