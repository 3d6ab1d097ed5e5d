"""GGUF files that lose experts or blocks: what the run writes, reports, refuses and leaves."""

import json

import pytest
import torch
from apt_plugins.gguf_files.quantised import GgufCheckpoint
from gguf import GGMLQuantizationType, GGUFReader

from apt.output import staging
from apt.output.report import Report
from apt.pruning.expert_choice import needed
from tests.helpers.families import STACKED
from tests.helpers.gguf_mixtures import random_mixture, write_mixture

pytestmark = pytest.mark.skipif(not STACKED, reason="before transformers 5, experts are modules")

SMALL = ("--samples", 4, "--seqlen", 16)


@pytest.fixture
def model(tmp_path, tokenizer):
    """A function that writes a random model as ``model.gguf``."""

    def make(case, kind="Q8_0", **sizes):
        kind = getattr(GGMLQuantizationType, kind)
        write_mixture(tmp_path / "model.gguf", random_mixture(case, **sizes), case, tokenizer, kind)
        return "model.gguf"

    return make


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def blocks_of(path):
    """The bytes of each tensor by name, as rows of the first dimension."""
    return {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}


@pytest.mark.parametrize("case", ["qwen3moe", "gpt-oss"])
def test_a_file_becomes_a_smaller_file_with_a_report_beside_it(case, model, apt, tmp_path):
    result = apt("shrink", model(case), "--size", "experts=4", *SMALL, "-o", "small.gguf")
    assert result.code == 0, result.err
    assert names(tmp_path) == ["model.gguf", "small.apt_report.json", "small.gguf"]
    report = Report.read(tmp_path / "small.gguf")
    assert set(report.files) == {"small.gguf"}
    whole, small = blocks_of(tmp_path / "model.gguf"), blocks_of(tmp_path / "small.gguf")
    for name, stored in small.items():
        rows = list(range(len(whole[name])))
        if "exps" in name or "gate_inp" in name:
            index = name.split(".")[1]
            lost = report.structure["experts"][f"model.layers.{index}"]["removed"]
            rows = [row for row in rows if row not in lost]
        assert stored.tobytes() == whole[name][rows].tobytes(), name
    assert apt("report", "small.gguf", "-o", "page.html").code == 0
    assert "Removed experts" in (tmp_path / "page.html").read_text()


def test_a_result_is_measured_and_made_smaller_again(model, apt, tmp_path):
    command = ("shrink", model("qwen3moe"), "--size", "experts=6", *SMALL, "--eval", "builtin")
    assert apt(*command, "-o", "small.gguf").code == 0
    report = Report.read(tmp_path / "small.gguf")
    text = ("--data", "builtin", "--samples", 4, "--seqlen", 16)
    for file, when in (("model.gguf", "before"), ("small.gguf", "after")):
        result = apt("eval", file, "--stream", *text, "--json")
        assert result.code == 0, result.err
        perplexity = json.loads(result.out)["perplexity"]
        assert perplexity == pytest.approx(report.scores[when]["perplexity"], rel=1e-4)
    result = apt("shrink", "small.gguf", "--drop", "0,3", *SMALL, "-o", "less.gguf")
    assert result.code == 0, result.err
    again = Report.read(tmp_path / "less.gguf")
    assert again.structure["blocks"]["kept"] == 2
    assert again.earlier["structure"]["groups"]["experts"] == {"kept": 6, "of": 8}


@pytest.mark.parametrize("options", [["--drop", "1"], ["--blocks", "2"], ["--depth-only"]])
def test_a_dense_file_loses_blocks_in_place(options, model, apt, tmp_path):
    result = apt("shrink", model("llama-dense"), *options, *SMALL, "-o", "small.gguf")
    assert result.code == 0, result.err
    assert names(tmp_path) == ["model.gguf", "small.apt_report.json", "small.gguf"]
    structure = Report.read(tmp_path / "small.gguf").structure
    kept = [i for i in range(4) if f"model.layers.{i}" not in structure["blocks"]["dropped"]]
    assert len(kept) == structure["blocks"]["kept"] < 4
    whole, small = blocks_of(tmp_path / "model.gguf"), blocks_of(tmp_path / "small.gguf")
    for name, stored in small.items():
        source = name
        if name.startswith("blk."):
            _, index, rest = name.split(".", 2)
            source = f"blk.{kept[int(index)]}.{rest}"
        assert stored.tobytes() == whole[source].tobytes()


def test_compensation_changes_the_last_weights_of_experts_alone(model, apt, tmp_path):
    command = ("shrink", model("qwen3moe"), "--size", "experts=4", "--compensate", *SMALL)
    result = apt(*command, "-o", "small.gguf")
    assert result.code == 0, result.err
    rounded = Report.read(tmp_path / "small.gguf").structure["rounded"]
    assert set(rounded.values()) == {"q8_0"}
    assert {name.rpartition(".")[2] for name in rounded} == {"down_proj"}
    assert "4 tensors have new values" in result.out


def test_an_existing_file_is_replaced_only_if_asked(model, apt, tmp_path):
    command = ("shrink", model("llama-dense"), *SMALL, "-o", "small.gguf")
    (tmp_path / "small.gguf").write_bytes(b"of a user")
    result = apt(*command, "--drop", "1")
    assert (result.code, "small.gguf exists" in result.err) == (2, True)
    assert (tmp_path / "small.gguf").read_bytes() == b"of a user"
    assert apt(*command, "--drop", "1", "--overwrite").code == 0
    assert Report.read(tmp_path / "small.gguf").structure["blocks"]["kept"] == 3
    (tmp_path / "small.gguf").unlink()
    assert "small.apt_report.json exists" in apt(*command, "--drop", "1").err
    same = apt("shrink", "model.gguf", *SMALL, "--drop", "1", "-o", "model.gguf", "--overwrite")
    assert "is inside an input of the run" in same.err


def test_an_interrupted_run_leaves_nothing(model, apt, tmp_path, monkeypatch):
    write = GgufCheckpoint.write_sliced

    def interrupt(self, slices, target):
        write(self, slices, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(GgufCheckpoint, "write_sliced", interrupt)
    result = apt("shrink", model("llama-dense"), "--drop", "1", *SMALL, "-o", "small.gguf")
    assert (result.code, "nothing was written" in result.err) == (130, True)
    assert names(tmp_path) == ["model.gguf"]


def test_a_file_that_appears_meanwhile_is_not_replaced(model, apt, tmp_path, monkeypatch):
    publish = staging.FileStaging.publish

    def appear(self):
        (tmp_path / "small.gguf").write_bytes(b"of a user")
        publish(self)

    monkeypatch.setattr(staging.FileStaging, "publish", appear)
    result = apt("shrink", model("llama-dense"), "--drop", "1", *SMALL, "-o", "small.gguf")
    assert (result.code, "the result is complete, in" in result.err) == (2, True)
    assert (tmp_path / "small.gguf").read_bytes() == b"of a user"
    assert (tmp_path / ".small.gguf.apt" / "out" / "small.gguf").is_file()


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_one_line(part, model, apt, tmp_path):
    path = tmp_path / model("qwen3moe")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    result = apt("shrink", path, "--size", "experts=4", *SMALL, "-o", "small.gguf")
    assert result.code == 2
    assert "model.gguf" in result.err
    assert names(tmp_path) == ["model.gguf"]


def test_other_sizes_are_written_by_the_export(model, apt, tmp_path):
    result = apt("shrink", model("llama-dense"), "--size", "channels=32", *SMALL, "-o", "x.gguf")
    assert result.code == 0, result.err
    assert names(tmp_path) == ["model.gguf", "x.apt_report.json", "x.gguf"]


MIX = ("--calibration", "builtin:chat,builtin:code")


@pytest.mark.parametrize("options", [(), ("--dense-scores",), ("--expert-tokens", 8)])
def test_experts_that_a_source_of_a_mix_needs_are_kept(options, model, apt, tmp_path):
    protect = (*MIX, "--protect", "builtin:code")
    command = ("shrink", model("qwen3moe"), "--size", "experts=4", *SMALL, *protect, *options)
    result = apt(*command, "-o", "small.gguf")
    assert result.code == 0, result.err
    report = Report.read(tmp_path / "small.gguf")
    assert [source["samples"] for source in report.calibration["sources"]] == [2, 2]
    assert report.structure["rounded"] == {}
    for name, entry in report.structure["experts"].items():
        weights = report.routing[name]["weights"]["builtin:code"]
        mask = needed(torch.tensor(weights, dtype=torch.double))
        experts = set(mask.nonzero().squeeze(1).tolist())
        assert experts & {*entry["removed"]} == {*entry.get("unprotected", ())}


@pytest.mark.parametrize("method", ["reap", "expert-effect", "expert-merge"])
def test_dense_scores_of_a_file_serve_another_number_of_experts(method, model, apt, tmp_path):
    whole = ("shrink", model("qwen3moe"), *SMALL, *MIX, "--dense-scores", "--method", method)
    for count, output in ((6, "first.gguf"), (4, "whole.gguf")):
        assert apt(*whole, "--size", f"experts={count}", "-o", output).code == 0
    second = ("shrink", "model.gguf", "--from", "first.gguf", "--size", "experts=4")
    result = apt(*second, "-o", "second.gguf")
    assert result.code == 0, result.err
    assert (tmp_path / "second.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    reports = [Report.read(tmp_path / name) for name in ("second.gguf", "whole.gguf")]
    assert reports[0].structure == reports[1].structure
    assert reports[0].routing == reports[1].routing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--from", "first.gguf", "--compensate"), "exact weights need a calibration"),
        (("--from", "first.gguf", "-o", "first.gguf", "--overwrite"), "is inside an input"),
        (("--from", "model.gguf"), "has no apt_report.json"),
        (("--dense-scores", "--drop", "1"), "where blocks are dropped"),
        (("--dense-scores", "--method", "expert-joint"), "does not score experts one by one"),
        ((*MIX, "--protect", "code"), "code is not a source of the calibration"),
    ],
)
def test_scores_that_do_not_serve_a_file_are_refused(options, message, model, apt, tmp_path):
    first = ("shrink", model("qwen3moe"), "--size", "experts=6", *SMALL, "--dense-scores")
    assert apt(*first, "-o", "first.gguf").code == 0
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    output = () if "-o" in options else ("-o", "second.gguf")
    result = apt("shrink", "model.gguf", "--size", "experts=4", *SMALL, *options, *output)
    assert (result.code, message in result.err) == (2, True), result.err
    assert "block 1/4" not in result.err
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before
