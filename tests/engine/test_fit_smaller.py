"""``apt-prune fit`` below the smallest file of the model: a smaller model with more bits."""

import shlex
import shutil
from itertools import chain
from pathlib import Path

import pytest
import torch
from apt_lab.reproduction import command_of
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from apt import FitRun, Report, run
from apt.distributed.ranks import Ranks
from apt.engine import fit_smaller, fit_task
from apt.engine.file_forms import smaller_models
from apt.engine.fit_smaller import best_task
from apt.engine.opening import resolve_names
from apt.engine.run import resolve
from apt.plugin.registry import registry
from tests.helpers import TEXT

MODEL = "zoo:llama"
TEXTS = ("--samples", 8, "--seqlen", 64, "--effort", "fast", "--calibration", TEXT)
SIZE = "480kB"
"""Below the smallest file of the whole model: it fits with half of the blocks."""


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, two_blocks):
    """The folder of a file of a smaller model, and the report."""
    folder = tmp_path_factory.mktemp("fit")
    texts = {"calibration": str(TEXT), "evaluation": str(TEXT)}
    options = {"samples": 8, "seqlen": 64, "effort": "fast", **texts}
    return folder, run(
        FitRun(model=str(two_blocks), size=SIZE, output=folder / "a.gguf", **options)
    )


def task_of(**options):
    """The task of a fit."""
    options = {"model": MODEL, "output": Path("x.gguf"), **options}
    request = resolve_names(FitRun(**options), registry(), lambda line: None)
    return resolve(request, registry(), lambda line: None, Ranks())


def test_file_of_a_smaller_model_fits_where_bits_alone_do_not(fitted, apt, two_blocks):
    folder, report = fitted
    assert sorted(path.name for path in folder.iterdir()) == ["a.apt_report.json", "a.gguf"]
    size = (folder / "a.gguf").stat().st_size
    assert 475_000 < size == report.fit["size"] <= report.fit["budget"] == 480_000
    refused = apt("fit", two_blocks, *TEXTS, "--size", SIZE, "--may", "bits", "-o", "b.gguf")
    assert refused.code == 2
    assert "does not fit into 480,000 bytes: its smallest gguf file has 6" in refused.err


def test_report_has_the_whole_model_and_the_compared_models(fitted, two_blocks):
    folder, report = fitted
    candidates = report.fit["candidates"]
    whole, chosen = candidates[0], [each for each in candidates if each["chosen"]]
    assert (whole["means"], whole["share"], whole["predicted"]) == ("bits", 1.0, None)
    assert len(chosen) == 1
    assert chosen[0]["measured"] == report.fit["loss"] > 0
    fitting = [each for each in candidates if each["predicted"] is not None]
    assert fitting  # how many are estimated depends on the losses of the first ones
    assert sum(each["measured"] is not None for each in candidates) == min(2, len(fitting))
    assert {each["means"] for each in candidates} == {"bits", "width", "depth"}
    assert (chosen[0]["means"], chosen[0]["kept"]) == ("depth", {"blocks": 1})
    assert report.structure["blocks"]["kept"] == 1
    assert report.structure["share"] == chosen[0]["share"] == 0.5
    assert report.model["reference"] == report.options["model"] == two_blocks.name
    whole = Report.read(folder / "a.gguf").scores
    before, after = (whole[which]["perplexity"] for which in ("before", "after"))
    assert before < after < 3 * before
    assert len(report.fit["table"]["tensors"]) == 1 + 2 * 7


def test_file_opens_as_the_smaller_model(fitted):
    folder, report = fitted
    opened = AutoModelForCausalLM.from_pretrained(folder, gguf_file="a.gguf", dtype=torch.float32)
    assert opened.config.num_hidden_layers == report.structure["blocks"]["kept"]
    types = {t.name: t.tensor_type.name.lower() for t in GGUFReader(folder / "a.gguf").tensors}
    levels = {name: level.lower() for name, level in report.fit["levels"].items()}
    assert types["token_embd.weight"] == levels["model.embed_tokens.weight"]


def test_command_of_the_report_and_its_table_give_the_same_file(fitted, apt, two_blocks):
    folder, report = fitted
    shutil.copy(folder / "a.apt_report.json", "a.apt_report.json")
    shutil.copy(folder / "a.gguf", "a.gguf")
    assert apt("verify", "a.gguf").code == 0
    assert apt("report", "a.gguf", "-o", "page.html").code == 0
    command = shlex.split(command_of(report.to_dict()))
    assert command[:3] == ["apt-prune", "fit", two_blocks.name]
    Path(two_blocks.name).symlink_to(two_blocks)
    shutil.copy(TEXT, "text.txt")
    again = apt(*command[1:-1], "again.gguf", "--from", "a.gguf")
    assert again.code == 0, again.err
    assert Path("again.gguf").read_bytes() == Path("a.gguf").read_bytes()
    for word in ("predicted", "measured", "whole", "smaller model: "):
        assert word in again.out


def test_interrupted_run_goes_on_with_its_models(fitted, apt, tmp_path, monkeypatch, two_blocks):
    options = ("fit", two_blocks, *TEXTS, "--size", SIZE, "--eval", TEXT, "-o", "b.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(fit_task, "prune_model", interrupt)
        interrupted = apt(*options)
    assert interrupted.code == 130
    assert "the same command takes the measured losses" in interrupted.err
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".b.gguf.smaller", ".b.gguf.table.jsonl"]
    monkeypatch.setattr(fit_smaller, "Proxy", interrupt)
    monkeypatch.setattr(fit_task, "sensitivities", interrupt)
    assert apt(*options).code == 0
    assert (tmp_path / "b.gguf").read_bytes() == (fitted[0] / "a.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.apt_report.json", "b.gguf"]


def interrupt(*arguments, **options):
    """The effect of Ctrl+C."""
    raise KeyboardInterrupt


def test_sizes_of_files_are_known_before_the_smaller_models_exist():
    task = task_of(size="800kB")
    parts = (task.target.smaller_form, task.skeleton, task.options.means)
    rows = [list(row) for row in smaller_models(*parts, given=True)]
    smallest = [*chain(*smaller_models(*parts, given=True, smallest=True))]
    made = next(model for model in rows[2] if model.numbers == {"blocks": 3, "channels": 224})
    assert [{model.means for model in row} for row in rows] == [
        {("width",)}, {("depth",)}, {("depth", "width")},
    ]  # fmt: skip
    assert made.label == "3-blocks-224-channels"
    assert made.form.levels.keys() <= task.form.levels.keys()
    assert [row[-1].numbers for row in rows] == [model.numbers for model in smallest]
    for row in rows:
        shares = [model.size.share for model in row]
        assert shares == sorted(shares, reverse=True)
        assert row[-1].smallest == min(model.smallest for model in row)


def test_smaller_models_are_not_tried_where_bits_cost_little(monkeypatch, tmp_path, two_blocks):
    monkeypatch.chdir(tmp_path)
    task = task_of(model=str(two_blocks), size="900kB", samples=2, seqlen=32)
    monkeypatch.setattr(fit_smaller, "smaller_models", interrupt)
    assert best_task(task, interrupt, lambda phase, text="": None) is task


def test_expected_gain_of_fewer_channels_leaves_fewer_blocks_to_compare(
    monkeypatch, tmp_path, two_blocks
):
    monkeypatch.chdir(tmp_path)
    compared = []

    def loss(self, kept, dropped, tokens):
        compared.append(tuple(dropped))
        return 0.0  # below the loss of the whole model

    monkeypatch.setattr(fit_smaller.Proxy, "loss", loss)
    task = task_of(model=str(two_blocks), size=SIZE, samples=2, seqlen=32, calibration=str(TEXT))
    with pytest.raises(KeyboardInterrupt):  # it makes the best of them
        best_task(task, interrupt, lambda phase, text="": None)
    assert {len(dropped) for dropped in compared} == {0, 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "10kB"), "does not fit into 10,000 bytes: its smallest gguf file has 5"),
        (("--may", "width"), "may width does not choose the bits; add them: bits,width"),
        (("--may", "bits,less"), "may 'less' is not one of zeros, bits, width, depth, experts"),
        (("--may", "bits,bits"), "may bits,bits has a name twice"),
        (("--may", "bits,experts"), "fit has no experts to choose for gguf; choose from bits"),
        (("--may", "zeros,bits"), "fit has no zeros to choose for gguf"),
    ],
)
def test_impossible_means_are_errors_of_one_line(words, message, apt, tmp_path):
    size = () if "--size" in words else ("--size", SIZE)
    result = apt("fit", MODEL, *TEXTS, *size, "-o", "x.gguf", *words)
    assert result.code == 2
    assert message in result.err
    assert result.err.strip().count("\n") <= 3
    assert not list(tmp_path.iterdir())


def test_model_of_one_block_has_no_depth(apt, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(zoo(), dtype=torch.bfloat16)
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    model.save_pretrained("one")
    for path in zoo().glob("tokenizer*"):
        shutil.copy(path, "one")
    refused = apt("fit", "one", *TEXTS, "--size", "600kB", "--may", "bits,depth", "-o", "x.gguf")
    assert refused.code == 2
    assert "this model has one block, which cannot be dropped" in refused.err
    task = task_of(model="one", size="600kB")
    smaller = smaller_models(
        task.target.smaller_form, task.skeleton, task.options.means, given=False
    )
    assert {model.means for row in smaller for model in row} == {("width",)}
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def zoo():
    """The directory of the model."""
    return registry().adapters.get("llama").zoo_path()
