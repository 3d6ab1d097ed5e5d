"""Files that former versions wrote are read as they were."""

import json
import shutil

import pytest

import apt
from apt.packing.directory import unpack
from apt.runtime import load
from tests.stability.make_files import FILES, tensor_hashes


@pytest.fixture(params=sorted(path.name for path in FILES.iterdir()))
def former(request, tmp_path):
    """A packed directory of a former version, in a folder that a test may change."""
    copy = tmp_path / request.param
    shutil.copytree(FILES / request.param, copy)
    return copy


def test_packed_model_has_the_values_of_the_plain_one(former, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    unpack(former, plain)
    assert tensor_hashes(plain) == json.loads((former / "hashes.json").read_text())


def test_packed_model_opens(former):
    assert load(former).config.quantization_config.quant_method == "apt_packed"


def test_report_is_read(former):
    report = apt.Report.read(former)
    assert report.sparsity == pytest.approx(0.6, abs=0.01)
    assert report.options["quantize"] == "int4"
    assert report.scores["after"]["perplexity"] > 1
    assert report.sites[0].relative_error > 0
