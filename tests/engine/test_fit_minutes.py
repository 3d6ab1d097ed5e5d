"""``apt-prune fit --minutes``: the rest of a given time is spent on norms and biases."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors import safe_open

from apt import FitRun, Report, run
from apt.checkpoints.load import open_skeleton
from apt.locations.model_source import find
from apt.plugin.registry import registry
from apt.recovery import recover as recovery
from tests.helpers import TEXT

GIVEN = {
    "samples": 8, "seqlen": 64, "effort": "fast", "calibration": str(TEXT), "evaluation": str(TEXT),
}  # fmt: skip
WORDS = (
    "--samples", 8, "--seqlen", 64, "--effort", "fast", "--calibration", TEXT, "--eval", TEXT,
    "--may", "bits",
)  # fmt: skip


@pytest.fixture
def few_steps(monkeypatch):
    """A training of 12 steps in any time."""
    monkeypatch.setattr(recovery, "_steps_in", lambda seconds, *_: (12, 4, 12))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, two_blocks):
    """A file without a training, and its report."""
    path = tmp_path_factory.mktemp("fit") / "a.gguf"
    return path, run(FitRun(model=str(two_blocks), **GIVEN, size="665kB", may="bits", output=path))


def test_rest_of_the_time_trains_the_norms_of_a_file(fitted, few_steps, apt, two_blocks):
    path, plain = fitted
    done = apt(
        "fit", two_blocks, *WORDS, "--size", "665kB", "--minutes", 9, "--from", path, "-o", "b.gguf"
    )
    assert done.code == 0, done.err
    assert "loss on the samples held back: " in done.out
    report = Report.read(Path("b.gguf"))
    assert report.options["minutes"] == 9
    options, losses = report.recovery["options"], dict(report.recovery["training"]["held_back"])
    assert options["kind"] == "norms"
    assert 8 < options["minutes"] < 9
    assert losses[report.recovery["training"]["best"]] < losses[0]
    assert report.fit == Report.read(path).fit
    assert report.scores["after"]["perplexity"] < plain.scores["after"]["perplexity"]
    before, after = ({t.name: t for t in GGUFReader(p).tensors} for p in (path, "b.gguf"))
    changed = {n for n, t in before.items() if not np.array_equal(t.data, after[n].data)}
    assert changed
    assert all("norm" in name for name in changed)
    assert apt("verify", "b.gguf").code == 0


def test_rest_of_the_time_trains_the_norms_of_a_smaller_model(few_steps, tmp_path, two_blocks):
    path = tmp_path / "c.gguf"
    report = run(
        FitRun(
            model=str(two_blocks), **GIVEN, size="560kB", may="bits,width", minutes=9, output=path
        )
    )
    assert report.structure["share"] < 1
    assert report.recovery["options"]["kind"] == "norms"
    assert report.recovery["parameters_before"] == pytest.approx(weights(two_blocks), rel=1e-3)
    assert path.stat().st_size == report.fit["size"] <= 560_000


def test_rest_of_the_time_trains_the_norms_of_a_packed_directory(few_steps, apt, two_blocks):
    size = ("fit", two_blocks, *WORDS, "--size", "1.33MB")
    runs = [
        apt(*size, "-o", "table"),
        apt(*size, "--from", "table", "--minutes", 1e-6, "-o", "plain"),
        apt(*size, "--from", "table", "--minutes", 9, "-o", "timed"),
    ]
    assert [done.code for done in runs] == [0, 0, 0], runs[-1].err
    assert "no time was left for the training" in runs[1].out
    report = Report.read(Path("timed"))
    assert report.fit["size"] <= 1_330_000
    assert report.recovery["options"]["kind"] == "norms"
    before, after = (tensors_of(Path(name)) for name in ("plain", "timed"))
    changed = {n for n, t in before.items() if not torch.equal(t, after[n])}
    assert changed
    assert all("norm" in name for name in changed)
    assert apt("verify", "timed").code == 0


def weights(directory):
    """The number of weights of the whole model."""
    skeleton = open_skeleton(find(str(directory), registry()), registry())
    return sum(parameter.numel() for parameter in skeleton.module.parameters())


def tensors_of(directory):
    """The stored tensors of a packed directory."""
    with safe_open(directory / "apt_packed.safetensors", "pt") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


def test_fit_without_time_for_a_training_says_so(fitted, apt, two_blocks):
    words = ("fit", two_blocks, *WORDS, "--size", "665kB", "--from", fitted[0], "-o", "b.gguf")
    done = apt(*words, "--minutes", 1e-6)
    assert done.code == 0, done.err
    assert "no time was left for the training" in done.out
    assert Report.read(Path("b.gguf")).problems == ["no time was left for the training"]
    assert Path("b.gguf").read_bytes() == fitted[0].read_bytes()


def test_time_that_ends_before_the_table_is_an_error_of_one_line(apt, tmp_path, two_blocks):
    refused = apt("fit", two_blocks, *WORDS, "--size", "665kB", "--minutes", 1e-3, "-o", "b.gguf")
    assert refused.code == 2
    assert "0.001 minutes are too few: the table of losses alone takes about 0." in refused.err
    assert "(--minutes)" in refused.err
    assert not list(tmp_path.iterdir())
