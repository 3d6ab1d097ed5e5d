"""A run whose output is NAME.gguf leaves this file and its report, and no directory."""

import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
pytest.importorskip("accelerate", reason="the extra [gguf] is not installed")

import apt as package  # noqa: E402
import apt.engine.run as driver  # noqa: E402
from apt.errors import AptError  # noqa: E402
from apt.files.hashes import sha256  # noqa: E402
from apt.output.report import Report  # noqa: E402
from tests.helpers import TEXT  # noqa: E402
from tests.helpers.gguf_files import checkpoint_of, entries, read  # noqa: E402
from tests.helpers.gguf_mixtures import random_mixture, write_mixture  # noqa: E402
from tests.helpers.interrupted import PLACES, KilledError, cut  # noqa: E402

SHORT = ("--samples", 4, "--seqlen", 24, "--calibration", TEXT)
PRUNE = ("prune", "model", "--pattern", "2:4", "--effort", "fast", *SHORT)
STREAMED = (*PRUNE, "--stream")
BOTH = ["model", "x.apt_report.json", "x.gguf"]


@pytest.fixture
def model(apt, tokenizer):
    """A random LLaMA in the directory ``model``."""
    checkpoint_of(tokenizer)
    return "model"


def names():
    return sorted(path.name for path in Path().iterdir())


def fail(message):
    """An export that fails, and does not leave a file."""

    def export(*args):
        raise AptError(message, "free space")

    return export


def interrupt(*args):
    raise KeyboardInterrupt


def kill(*args):
    raise KilledError


def test_file_and_report_are_left_alone(model, apt):
    run = apt(*PRUNE, "-o", "x.gguf", "--eval", TEXT)
    assert run.code == 0, run.err
    assert names() == BOTH
    assert "x.gguf: 50.00% zeros in the pruned sites, verified on disk" in run.out
    assert f"perplexity on {TEXT}, before the export: " in run.out
    report = Report.read("x.gguf")
    assert report.files == {"x.gguf": sha256(Path("x.gguf"))}
    assert report.options["output"] == "x.gguf"
    assert report.scores["after"]["perplexity"] > 0
    size, zeros = Path("x.gguf").stat().st_size, sum(site.zeros for site in report.sites)
    counts = {"type": "f32", "tensors": 21, "size": size, "zeros": zeros, "kept": zeros}
    assert report.export == counts
    assert apt("prune", *PRUNE[1:], "-o", "y", "--export", "y.gguf").code == 0
    assert Report.read("y").export == {}
    assert [*names()] == ["model", "x.apt_report.json", "x.gguf", "y", "y.gguf"]
    differing = {key for key, value in entries(Path("y.gguf")).items()
                 if entries(Path("x.gguf"))[key] != value}  # fmt: skip
    assert differing == {"general.name"}
    tensors = (gguf.GGUFReader(path).tensors for path in ("x.gguf", "y.gguf"))
    assert all(np.array_equal(a.data, b.data) for a, b in zip(*tensors, strict=True))
    assert gguf.GGUFReader("x.gguf").fields["general.name"].contents() == "x"


def test_program_gets_the_report_of_the_file(model, apt):
    run = package.PruneRun(
        model="model", output="x.gguf", sparsity=0.5, method="wanda", samples=4, seqlen=24,
        calibration=str(TEXT),
    )  # fmt: skip
    report = package.run(run)
    assert names() == BOTH
    assert report.files == Report.read("x.gguf").files == {"x.gguf": sha256(Path("x.gguf"))}
    assert report.export == Report.read("x.gguf").export
    with pytest.raises(AptError, match=r"x\.gguf exists"):
        package.run(run)


def test_quantised_tensors_keep_their_types_and_the_summary_counts_the_zeros(
    apt, tmp_path, tokenizer
):
    mixture = random_mixture("llama-dense", size=256)
    write_mixture(tmp_path / "m.gguf", mixture, "llama-dense", tokenizer,
                  gguf.GGMLQuantizationType.Q4_1)  # fmt: skip
    command = ("prune", "m.gguf", "--sparsity", 0.5, "--method", "wanda", *SHORT)
    run = apt(*command, "-o", "x.gguf")
    assert run.code == 0, run.err
    assert Path("x.gguf").stat().st_size == pytest.approx(Path("m.gguf").stat().st_size, rel=0.01)
    export = Report.read("x.gguf").export
    assert export["type"] == "q4_1"
    assert export["kept"] < export["zeros"] / 2
    share = f"{export['kept'] / export['zeros']:.2%}"
    assert f"zeros in the pruned sites, of which the file keeps {share}" in run.out
    assert f"zeros kept ({share})" in run.err
    assert "not every block of q4_1 has a zero" in run.err
    assert "--export-type" in run.err
    run = apt(*command, "-o", "y.gguf", "--export-type", "q8_0")
    assert run.code == 0, run.err
    export = Report.read("y.gguf").export
    assert (export["type"], export["kept"]) == ("q8_0", export["zeros"])
    assert "of which" not in run.out
    assert "--export-type" not in run.err


def test_file_is_replaced_only_with_overwrite(model, apt):
    Path("x.gguf").write_bytes(b"of a user")
    refused = apt(*PRUNE, "-o", "x.gguf")
    assert (refused.code, "x.gguf exists; overwrite it" in refused.err) == (2, True)
    assert refused.err.rstrip().endswith("(--output, --overwrite)")
    assert Path("x.gguf").read_bytes() == b"of a user"
    assert names() == ["model", "x.gguf"]
    assert apt(*PRUNE, "-o", "x.gguf", "--overwrite").code == 0
    first = Report.read("x.gguf")
    Path("x.gguf").unlink()
    assert "x.apt_report.json exists" in apt(*PRUNE, "-o", "x.gguf").err
    run = apt(*PRUNE, "-o", "x.gguf", "--overwrite", "--seed", 1)
    assert run.code == 0, run.err
    assert names() == BOTH
    assert Report.read("x.gguf").files != first.files


def test_directory_of_a_failed_export_is_kept_and_can_be_exported(model, apt, monkeypatch):
    for number, place in enumerate(["x", "x-1"]):
        with monkeypatch.context() as patch:
            patch.setattr(driver, "export_output", fail("the disk is full"))
            run = apt(*(PRUNE, STREAMED)[number], "-o", "x.gguf")
        assert run.code == 2
        line = run.err.splitlines()[-1]
        assert "x.gguf is not written: the disk is full; free space; " in line
        assert line.endswith(
            f"the model is complete, in {place}: apt-prune export {place} -o x.gguf"
        )
        assert Report.read(place).sparsity == 0.5
    assert names() == ["model", "x", "x-1"]
    assert apt("verify", "x").code == 0
    assert apt("export", "x", "-o", "x.gguf").code == 0


@pytest.mark.parametrize("command", [PRUNE, STREAMED])
def test_interrupted_export_keeps_the_directory(command, model, apt, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(driver, "export_output", interrupt)
        run = apt(*command, "-o", "x.gguf")
    assert run.code == 130
    assert names() == [".x.gguf.apt", "model"]
    again = apt(*command, "-o", "x.gguf", *(["--resume"] if command is STREAMED else []))
    if command is STREAMED:
        assert "give the same command with --resume" in run.err
        assert again.code == 0, again.err
        assert names() == BOTH
    else:
        assert f"the result is complete, in {Path('.x.gguf.apt/out').resolve()}" in run.err
        assert "is the complete result of an earlier run, not yet in its place" in again.err


@pytest.mark.parametrize(("place", "count"), [("journal", 4), ("write", 9), ("journal", 6)])
def test_resumed_run_writes_the_file_of_an_uninterrupted_one(place, count, model, apt, monkeypatch):
    assert apt(*STREAMED, "-o", "whole.gguf").code == 0
    with monkeypatch.context() as patch:
        cut(patch, PLACES[place], count, KilledError())
        with pytest.raises(KilledError):
            apt(*STREAMED, "-o", "x.gguf")
    assert ".x.gguf.apt" in names()
    assert not Path("x.gguf").exists()
    run = apt(*STREAMED, "-o", "x.gguf", "--resume")
    assert run.code == 0, run.err
    assert names() == ["model", "whole.apt_report.json", "whole.gguf", *BOTH[1:]]
    whole, resumed = (gguf.GGUFReader(name).tensors for name in ("whole.gguf", "x.gguf"))
    assert all(np.array_equal(a.data, b.data) for a, b in zip(whole, resumed, strict=True))
    again = apt(*STREAMED, "-o", "x.gguf", "--resume")
    assert (again.code, again.out) == (0, "x.gguf: already complete\n")
    other = apt(*STREAMED, "-o", "x.gguf", "--resume", "--seed", 1)
    assert "x.gguf is the result of another run: seed differ" in other.err
    packed = apt(*STREAMED, "-o", "x.gguf", "--resume", "--pack", "packed")
    assert "the directory to pack is deleted" in packed.err


def test_run_killed_after_the_publication_is_complete(model, apt, monkeypatch):
    original, folder = shutil.rmtree, Path(".x.gguf.apt").resolve()

    def killed(path, *args, **kwargs):
        if Path(path) == folder:
            raise KilledError
        original(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KilledError):
            apt(*STREAMED, "-o", "x.gguf")
    assert names() == [".x.gguf.apt", *BOTH]
    written = Path("x.gguf").read_bytes()
    run = apt(*STREAMED, "-o", "x.gguf", "--resume")
    assert run.code == 0, run.err
    assert names() == BOTH
    assert Path("x.gguf").read_bytes() == written


def test_packed_form_is_made_before_the_directory_is_deleted(model, apt):
    command = ("prune", "model", "--sparsity", "0.8", "--method", "magnitude", *SHORT)
    run = apt(*command, "-o", "x.gguf", "--pack", "x")
    assert run.code == 0, run.err
    assert names() == ["model", "x", "x.apt_report.json", "x.gguf"]
    assert Report.read("x").sparsity == pytest.approx(0.8, abs=0.01)
    assert apt("unpack", "x", "-o", "dense").code == 0
    assert apt("export", "dense", "-o", "dense.gguf").code == 0
    tensors = (gguf.GGUFReader(path).tensors for path in ("x.gguf", "dense.gguf"))
    assert all(np.array_equal(a.data, b.data) for a, b in zip(*tensors, strict=True))


def test_failed_metric_does_not_lose_the_file(model, apt, monkeypatch):
    from apt.engine.run_output import RunOutput

    measure = RunOutput.measure

    def broken(self, when):
        if when == "after":
            raise RuntimeError("no such number")
        measure(self, when)

    monkeypatch.setattr(RunOutput, "measure", broken)
    run = apt(*PRUNE, "-o", "x.gguf", "--eval", TEXT)
    assert run.code == 2
    assert "x.gguf is written and verified, but measuring it failed" in run.err
    assert names() == BOTH
    assert Report.read("x.gguf").problems


@pytest.mark.parametrize(
    ("options", "message", "flags"),
    [
        (("-o", "x.gguf", "--save-masks"), "save masks has no effect on x.gguf", "--save-masks"),
        (("-o", "x.gguf", "--max-shard-size", "5GB"), "max shard size has no effect", "--output"),
        (("-o", "x.gguf", "--export-type", "q9"), "gguf has no type 'q9'", "(--export-type)"),
        (("-o", "x", "--export-type", "q8_0"), "has no effect without a file", "--export-type"),
        (("-o", "x.gguf", "--pack", "x.gguf"), "pack x.gguf is the output itself", "--pack"),
        (("-o", "model/x.gguf"), "is inside an input of the run", "--output"),
    ],
)
def test_options_that_do_not_fit_one_file_are_refused(options, message, flags, model, apt):
    run = apt(*PRUNE, *options)
    assert run.code == 2
    assert message in run.err
    assert flags in run.err
    assert names() == ["model"]


def test_saved_options_and_dry_runs_name_the_file(model, apt):
    run = apt(*PRUNE, "-o", "x.gguf", "--dry-run", "--save-config", "c.toml")
    assert run.code == 0, run.err
    assert names() == ["c.toml", "model"]
    assert tomllib.loads(Path("c.toml").read_text())["output"] == "x.gguf"
    run = apt("prune", "--config", "c.toml", "--json")
    assert run.code == 0, run.err
    assert json.loads(run.out)["output"] == "x.gguf"
    assert names() == ["c.toml", *BOTH]


def test_recovered_and_smaller_models_are_one_file(model, apt):
    run = apt("shrink", "model", "--size", "channels=32", *SHORT, "-o", "small.gguf")
    assert run.code == 0, run.err
    assert Report.read("small.gguf").structure["groups"]
    assert read(Path("small.gguf").resolve()).config.intermediate_size == 32
    assert apt(*PRUNE, "-o", "pruned").code == 0
    train = ("recover", "pruned", "--kind", "layers", "--steps", 4, "--checks", 1, "--batch", 2,
             *SHORT[2:])  # fmt: skip
    run = apt(*train, "-o", "x.gguf")
    assert run.code == 0, run.err
    assert "x.gguf: " in run.out.splitlines()[-1]
    assert names() == ["model", "pruned", "small.apt_report.json", "small.gguf", *BOTH[1:]]
    again = apt(*train, "-o", "x.gguf", "--resume")
    assert (again.code, again.out) == (0, "x.gguf: already complete\n")
    run = apt("recover", "x.gguf", *train[2:], "-o", "y")
    assert run.code == 0, run.err
    assert Report.read("y").export == {}
    weights = read(Path("x.gguf").resolve()).state_dict()
    masked = sum(int((tensor == 0).sum()) for tensor in weights.values() if tensor.ndim > 1)
    assert masked >= Report.read("x.gguf").recovery["zeros"]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
