"""``apt-prune fit``: a file of a given size, with a level for each tensor."""

import gguf
import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from apt import FitRun, Report, run
from apt.engine import fit_task
from apt.fit.table import LossTable
from apt.options.fit import read_bytes

SMALL = ("--samples", 4, "--seqlen", 32)
MODEL = "zoo:llama"


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A model in 1.2 MB, the folder of the file, and the report."""
    folder = tmp_path_factory.mktemp("fit")
    report = run(FitRun(model=MODEL, size="1.2MB", output=folder / "a.gguf", samples=4, seqlen=32))
    return folder, report


def test_file_has_exactly_the_promised_size_and_the_chosen_types(fitted):
    folder, report = fitted
    assert sorted(path.name for path in folder.iterdir()) == ["a.apt_report.json", "a.gguf"]
    size = (folder / "a.gguf").stat().st_size
    assert 1_190_000 < size == report.fit["size"] <= report.fit["budget"] == 1_200_000
    types = {t.name: t.tensor_type.name.lower() for t in GGUFReader(folder / "a.gguf").tensors}
    levels = {name: level.lower() for name, level in report.fit["levels"].items()}
    assert types["token_embd.weight"] == levels["model.embed_tokens.weight"]
    assert types["blk.2.ffn_down.weight"] == levels["model.layers.2.mlp.down_proj.weight"]
    assert types["blk.0.attn_norm.weight"] == "f32"
    assert len(levels) == 1 + 4 * 7


def test_file_opens_with_the_values_of_its_types(fitted):
    folder, _ = fitted
    opened = AutoModelForCausalLM.from_pretrained(folder, gguf_file="a.gguf", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(zoo_path(), dtype=torch.float32)
    for name, parameter in opened.named_parameters():
        original = dense.get_parameter(name)
        if "norm" in name:
            assert torch.equal(parameter, original)
        else:
            error = float(
                (parameter.detach() - original.detach()).norm() / original.detach().norm()
            )
            assert 0 < error < 0.6, name


def zoo_path():
    """The directory of the model."""
    from apt.plugin.registry import registry

    return registry().adapters.get("llama").zoo_path()


def test_another_budget_takes_the_table_of_an_earlier_run(fitted, apt, tmp_path):
    folder, report = fitted
    options = (MODEL, *SMALL, "--size", "1.3MB", "-o", "b.gguf")
    assert apt("fit", *options, "--from", folder / "a.gguf").code == 0
    second = Report.read(tmp_path / "b.gguf")
    assert second.fit["table"] == report.fit["table"]
    assert report.fit["size"] < second.fit["size"] <= 1_300_000
    assert second.fit["loss"] < report.fit["loss"]


def test_same_budget_gives_the_same_bytes_again(fitted, apt, tmp_path):
    folder, _ = fitted
    options = (MODEL, *SMALL, "--size", "1.2MB", "-o", "b.gguf")
    assert apt("fit", *options, "--from", folder / "a.gguf").code == 0
    assert (tmp_path / "b.gguf").read_bytes() == (folder / "a.gguf").read_bytes()


def test_interrupted_run_goes_on_with_its_table(fitted, apt, tmp_path, monkeypatch):
    options = ("fit", MODEL, *SMALL, "--size", "1.2MB", "-o", "b.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(fit_task, "prune_model", raises(KeyboardInterrupt))
        interrupted = apt(*options)
    assert interrupted.code == 130
    assert "the same command takes the measured losses" in interrupted.err
    assert [path.name for path in tmp_path.iterdir()] == [".b.gguf.table.jsonl"]
    monkeypatch.setattr(fit_task, "sensitivities", raises(AssertionError))
    assert apt(*options).code == 0
    assert (tmp_path / "b.gguf").read_bytes() == (fitted[0] / "a.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.apt_report.json", "b.gguf"]


def raises(error):
    """A function that raises an error."""

    def function(*arguments, **options):
        raise error

    return function


def test_table_of_another_model_is_refused(fitted, apt, tmp_path):
    folder, _ = fitted
    options = ("zoo:mamba", *SMALL, "--size", "3MB", "-o", "b.gguf")
    refused = apt("fit", *options, "--from", folder / "a.gguf")
    assert refused.code == 2
    assert not (tmp_path / "b.gguf").exists()


def test_losses_fall_with_the_bits_of_a_level(fitted):
    table = LossTable.read(fitted[1].fit["table"])
    for name, levels in table.tensors.items():
        losses = {level.name: level.loss for level in levels}
        assert 0 < losses["q8_0"] < losses["q5_0"] < losses["q4_0"], name
        if "q2_K" in losses:
            assert (
                losses["q6_K"] < losses["q5_K"] < losses["q4_K"] < losses["q3_K"] < losses["q2_K"]
            )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "10kB"), "does not fit into 10,000 bytes: its smallest gguf file has 1,0"),
        (("--size", "little"), "little is not a size; write 73MiB, 1.5GB"),
        ((), "size and bits are missing"),
        (("--size", "2MB", "--bits", 4), "size and bits are both given"),
        (("--size", "2MB", "-o", "out"), "the suffix of out does not say the format"),
        (("--size", "2MB", "--samples", 0), "fit needs calibration text"),
    ],
)
def test_impossible_requests_are_errors_of_one_line(words, message, apt, tmp_path):
    options = {"-o": "x.gguf", "--samples": 4, "--seqlen": 32}
    given = [word for pair in options.items() if pair[0] not in words for word in pair]
    result = apt("fit", MODEL, *given, *words)
    assert result.code == 2
    assert message in result.err
    assert result.err.strip().count("\n") <= 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "count"),
    [("73MiB", 73 * 2**20), ("1.5GB", 1_500_000_000), ("12", 12), (" 2 kb ", 2000), (7, 7)],
)
def test_sizes_are_read_in_their_units(text, count):
    assert read_bytes(text) == count


def test_no_budget_makes_a_file_larger_than_the_stored_model(apt, tmp_path):
    assert apt("fit", MODEL, *SMALL, "--size", "100MB", "-o", "b.gguf").code == 0
    report = Report.read(tmp_path / "b.gguf")
    assert report.fit["loss"] == 0
    assert set(report.fit["levels"].values()) == {"bf16"}
    kinds = {tensor.tensor_type for tensor in GGUFReader(tmp_path / "b.gguf").tensors}
    assert kinds == {gguf.GGMLQuantizationType.BF16, gguf.GGMLQuantizationType.F32}
