"""Files that former versions wrote are read as they were."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

import apt
from apt.packing.directory import unpack
from apt.runtime import load
from tests.stability.make_files import FILES

VERSIONS = sorted(path.name for path in FILES.iterdir())


@pytest.fixture(params=VERSIONS)
def former(request, tmp_path):
    """The files of a version, in a folder that a test may change."""
    copy = tmp_path / request.param
    shutil.copytree(FILES / request.param, copy)
    (copy / "model.safetensors").rename(tmp_path / "model.safetensors")
    return copy


def test_packed_model_has_the_values_of_the_plain_one(former, tmp_path):
    (former / "apt_report.json").unlink()
    unpack(former, tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    expected = load_file(tmp_path / "model.safetensors")
    assert plain.keys() == expected.keys()
    assert all(plain[name].equal(tensor) for name, tensor in expected.items())


def test_packed_model_opens(former):
    model = load(former)
    assert model.config.quantization_config.quant_method == "apt_packed"


def test_report_is_read(former):
    report = apt.Report.read(former)
    assert report.sparsity == pytest.approx(0.6, abs=0.01)
    assert report.options["quantize"] == "int4"
    assert report.scores["after"]["perplexity"] > 1
    assert report.sites[0].relative_error > 0
    assert Path(report.command.split()[2]).name == "model" if hasattr(report, "command") else True
