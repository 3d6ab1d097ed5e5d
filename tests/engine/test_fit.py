"""``apt-prune fit``: a file of a given size, with a level for each tensor."""

import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from apt_lab.reproduction import command_of
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from apt import AptError, FitRun, Report, run
from apt.engine import fit_task
from apt.engine.opening import resolve_names
from apt.engine.run import resolve
from apt.fit.table import LossTable
from apt.options.fit import read_bytes
from apt.plugin.registry import registry
from tests.helpers import TEXT

SMALL = ("--samples", 4, "--seqlen", 32, "--calibration", TEXT)
MODEL = "zoo:llama"


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, two_blocks):
    """A model in 720 kB, the folder of the file, and the report."""
    folder = tmp_path_factory.mktemp("fit")
    report = run(
        FitRun(
            model=str(two_blocks),
            size="720kB",
            output=folder / "a.gguf",
            samples=4,
            seqlen=32,
            calibration=str(TEXT),
        )
    )
    return folder, report


def test_file_has_exactly_the_promised_size_and_the_chosen_types(fitted):
    folder, report = fitted
    assert sorted(path.name for path in folder.iterdir()) == ["a.apt_report.json", "a.gguf"]
    size = (folder / "a.gguf").stat().st_size
    assert 710_000 < size == report.fit["size"] <= report.fit["budget"] == 720_000
    types = {t.name: t.tensor_type.name.lower() for t in GGUFReader(folder / "a.gguf").tensors}
    levels = {name: level.lower() for name, level in report.fit["levels"].items()}
    assert types["token_embd.weight"] == levels["model.embed_tokens.weight"]
    assert types["blk.1.ffn_down.weight"] == levels["model.layers.1.mlp.down_proj.weight"]
    assert types["blk.0.attn_norm.weight"] == "f32"
    file_type = GGUFReader(folder / "a.gguf").fields["general.file_type"].contents()
    assert gguf.LlamaFileType(file_type).name in ("MOSTLY_IQ4_NL", "MOSTLY_MXFP4_MOE")
    assert len(levels) == 1 + 2 * 7


def test_file_opens_with_the_values_of_its_types(fitted, two_blocks):
    folder, _ = fitted
    opened = AutoModelForCausalLM.from_pretrained(folder, gguf_file="a.gguf", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(two_blocks, dtype=torch.float32)
    for name, parameter in opened.named_parameters():
        original = dense.get_parameter(name)
        if "norm" in name:
            assert torch.equal(parameter, original)
        else:
            error = float(
                (parameter.detach() - original.detach()).norm() / original.detach().norm()
            )
            assert 0 < error < 0.6, name


def test_another_budget_takes_the_table_of_an_earlier_run(fitted, apt, tmp_path, two_blocks):
    folder, report = fitted
    options = (two_blocks, *SMALL, "--size", "780kB", "-o", "b.gguf")
    assert apt("fit", *options, "--from", folder / "a.gguf").code == 0
    second = Report.read(tmp_path / "b.gguf")
    assert second.fit["table"] == report.fit["table"]
    assert report.fit["size"] < second.fit["size"] <= 780_000
    assert second.fit["loss"] < report.fit["loss"]


def test_same_budget_gives_the_same_bytes_again(fitted, apt, tmp_path, two_blocks):
    folder, _ = fitted
    options = (two_blocks, *SMALL, "--size", "720kB", "-o", "b.gguf")
    assert apt("fit", *options, "--from", folder / "a.gguf").code == 0
    assert (tmp_path / "b.gguf").read_bytes() == (folder / "a.gguf").read_bytes()


def test_interrupted_run_goes_on_with_its_table(fitted, apt, tmp_path, monkeypatch, two_blocks):
    options = ("fit", two_blocks, *SMALL, "--size", "720kB", "-o", "b.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(fit_task, "measured_levels", raises(KeyboardInterrupt))
        assert apt(*options).code == 130
    assert not list(tmp_path.iterdir())
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
        (("--size", "10kB"), "does not fit into 10,000 bytes: its smallest gguf file has 5"),
        (("--size", "little"), "little is not a size; write 73MiB, 1.5GB"),
        ((), "size and bits are missing"),
        (("--size", "2MB", "--bits", 4), "size and bits are both given"),
        (("--size", "2MB", "-o", "out", "--for", "gguf"), "the output out is not a .gguf file"),
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


def test_no_budget_makes_a_file_larger_than_the_stored_model(apt, tmp_path, two_blocks):
    assert apt("fit", two_blocks, *SMALL, "--size", "100MB", "-o", "b.gguf").code == 0
    report = Report.read(tmp_path / "b.gguf")
    assert report.fit["loss"] == 0
    assert set(report.fit["levels"].values()) == {"bf16"}
    kinds = {tensor.tensor_type for tensor in GGUFReader(tmp_path / "b.gguf").tensors}
    assert kinds == {gguf.GGMLQuantizationType.BF16, gguf.GGMLQuantizationType.F32}


def test_quantised_file_has_one_name_for_each_type_and_keeps_its_tensors(fitted, apt, tmp_path):
    folder, first = fitted
    shutil.copy(folder / "a.gguf", "a.gguf")
    assert apt("fit", "a.gguf", *SMALL, "--size", "715kB", "-o", "b.gguf").code == 0
    second = Report.read(tmp_path / "b.gguf")
    levels = first.fit["levels"]
    for name, level in second.fit["levels"].items():
        known = {found[0]: found[2] for found in second.fit["table"]["tensors"][name]}
        assert known[levels[name]] == 0
        assert len(known) == len({each.lower() for each in known})
        assert (known[level] == 0) == (level == levels[name])
    kept = {name for name, level in second.fit["levels"].items() if level == levels[name]}
    assert 0 < len(kept) < len(levels)
    stored = ({t.name: t for t in GGUFReader(name).tensors} for name in ("a.gguf", "b.gguf"))
    before, after = stored
    for block in range(2):
        if f"model.layers.{block}.mlp.down_proj.weight" in kept:
            name = f"blk.{block}.ffn_down.weight"
            assert (before[name].data == after[name].data).all()


def test_file_is_verified_by_its_hash_and_has_a_page(fitted, apt):
    folder, report = fitted
    for name in ("a.gguf", "a.apt_report.json"):
        shutil.copy(folder / name, name)
    done = apt("verify", "a.gguf")
    assert (done.code, done.out) == (0, "a.gguf: its files are as the report says\n")
    refused = apt("verify", "a.gguf", "--sparsity", 0.5)
    assert refused.code == 2
    assert "its zeros are not counted; leave these options out (--sparsity)" in refused.err
    assert apt("report", "a.gguf", "-o", "page.html").code == 0
    page = Path("page.html").read_text(encoding="utf-8")
    assert f"<td>{report.fit['size']:,} bytes</td>" in page
    assert "zeros in the pruned sites" not in page
    for level in set(report.fit["levels"].values()):
        assert f"× {level}" in page
    with Path("a.gguf").open("ab") as file:
        file.write(b"x")
    changed = apt("verify", "a.gguf")
    assert changed.code == 1
    assert "a.gguf was changed since it was written" in changed.out
    Path("a.apt_report.json").unlink()
    refused = apt("verify", "a.gguf")
    assert refused.code == 2
    assert "no report beside a.gguf lists it" in refused.err
    assert len(refused.err.splitlines()) == 1


def test_command_of_the_report_writes_the_same_file(fitted, apt, two_blocks):
    folder, report = fitted
    command = shlex.split(command_of(report.to_dict()))
    assert command[:3] == ["apt-prune", "fit", "blocks"]
    Path("blocks").symlink_to(two_blocks)
    shutil.copy(TEXT, "text.txt")
    again = apt(*command[1:-1], "again.gguf")
    assert again.code == 0, again.err
    assert Path("again.gguf").read_bytes() == (folder / "a.gguf").read_bytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"levels": 3}, "fit.levels is no object"),
        ({"table": {"rest": 1, "gradient": 0.0, "tensors": {"a": [["q8_0", -1, 0.0, 0.0]]}}},
         "fit.table.tensors.a[0][1] is no count"),
        ({"frontier": [[1]]}, "fit.frontier[0] is no list of 2 values"),
    ],
)  # fmt: skip
def test_damaged_report_of_a_fit_is_an_error_of_one_line(fitted, apt, damage, message, two_blocks):
    folder, _ = fitted
    shutil.copy(folder / "a.gguf", "a.gguf")
    record = json.loads((folder / "a.apt_report.json").read_text())
    record["fit"] |= damage
    Path("a.apt_report.json").write_text(json.dumps(record))
    options = (two_blocks, *SMALL, "--size", "780kB", "-o", "b.gguf")
    for words in (("report", "a.gguf", "-o", "p.html"), ("fit", *options, "--from", "a.gguf")):
        refused = apt(*words)
        assert refused.code == 2
        assert message in refused.err


def test_several_processes_are_refused():
    options = FitRun(model=MODEL, size="1.2MB", output=Path("a.gguf"))
    request = resolve_names(options, registry(), lambda line: None)
    with pytest.raises(AptError, match="fit runs in one process; start it without torchrun"):
        resolve(request, registry(), lambda line: None, SimpleNamespace(size=2, first=True))


def test_table_of_a_model_with_other_weights_is_refused(fitted, apt, tmp_path, two_blocks):
    model = AutoModelForCausalLM.from_pretrained(two_blocks, dtype=torch.bfloat16)
    model.model.norm.weight.data += 1
    model.save_pretrained("other")
    for path in two_blocks.glob("tokenizer*"):
        (tmp_path / "other" / path.name).write_bytes(path.read_bytes())
    table = ("--from", fitted[0] / "a.gguf")
    refused = apt("fit", "other", *SMALL, "--size", "720kB", "-o", "b.gguf", *table)
    assert refused.code == 2
    assert "was made from a model with other weights; leave it out" in refused.err
    assert not (tmp_path / "b.gguf").exists()
