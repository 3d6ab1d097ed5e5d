"""Models of images, of sounds, and models that write, from the command line."""

import json

import pytest
import torch
from safetensors.torch import load_file

from apt import PruneRun
from apt import run as run_task
from apt.checkpoints import processors
from apt.recovery import recover as recovery
from tests.inputs.conftest import write_wave


@pytest.fixture
def pairs(tmp_path):
    """A file of questions with answers."""
    rows = [{"source": f"What are {n} and {n}?", "target": f"{2 * n}, I say"} for n in range(24)]
    place = tmp_path / "pairs.jsonl"
    place.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return place


def prune(apt, model, source, *more, samples=8, output="out"):
    return apt(
        "prune", model, "--pattern", "2:4", "--method", "ss", "--calibration", source,
        "--samples", samples, "--device", "cpu", "-o", output, *more,
    )  # fmt: skip


def changed_tensors(model, output):
    """The number of tensors that differ; all of them have two zeros in four weights."""
    before, after = (load_file(each / "model.safetensors") for each in (model, output))
    names = [name for name in before if not torch.equal(before[name], after[name])]
    for name in names:
        kept = after[name].reshape(len(after[name]), -1, 4).count_nonzero(-1)
        assert kept.max() <= 2, name
    return len(names)


@pytest.mark.parametrize(
    ("name", "inputs", "metrics", "count"),
    [
        ("vit", "images", ("similarity", "predictions"), 12),
        ("clip", "images", ("similarity",), 24),
        ("wav2vec2", "sounds", ("similarity", "predictions"), 12),
        ("whisper", "sounds", ("token-changes", "predictions"), 32),
        ("t5", "pairs", ("token-changes", "predictions"), 32),
    ],
)
def test_a_model_is_pruned_and_measured(
    request, apt, model_of, tmp_path, name, inputs, metrics, count
):
    source, model = request.getfixturevalue(inputs), model_of(name)
    chosen = [] if "token-changes" in metrics else [f"--metric={metric}" for metric in metrics]
    result = prune(apt, model, source, "--eval", source, *chosen)
    assert result.code == 0, result.err
    assert changed_tensors(model, tmp_path / "out") == count
    scores = json.loads((tmp_path / "out" / "apt_report.json").read_text())["scores"]
    assert scores["before"] == {m: 0 if m == "token-changes" else pytest.approx(1) for m in metrics}
    assert scores["before"] != scores["after"]
    kept = {path.name for path in model.iterdir()} - {"model.safetensors"}
    assert kept <= {path.name for path in (tmp_path / "out").iterdir()}


def _zeros(directory):
    return {name: each == 0 for name, each in load_file(directory / "model.safetensors").items()}


@pytest.mark.parametrize(
    ("name", "inputs"),
    [("vit", "images"), ("clip", "images"), ("wav2vec2", "sounds"), ("whisper", "sounds"),
     ("t5", "builtin")],
)  # fmt: skip
def test_a_pruned_model_is_recovered(request, apt, model_of, tmp_path, name, inputs):
    """What a decoder reads is written by the dense model."""
    source = inputs if inputs == "builtin" else request.getfixturevalue(inputs)
    model = model_of(name)
    assert prune(apt, model, source, output="pruned").code == 0
    result = apt(
        "recover", "pruned", "--dense", model, "--calibration", source, "--steps", 8, "--checks", 8,
        "--batch", 4, "--samples", 12, "--seqlen", 32, "--rate", 3e-4,
        "--validation-share", 0.4, "-o", "out",
    )  # fmt: skip
    assert result.code == 0, result.err
    before, after = (_zeros(tmp_path / each) for each in ("pruned", "out"))
    masks = [key for key, zeros in before.items() if zeros.float().mean() == 0.5]
    assert masks
    assert all(before[key].equal(after[key]) for key in masks)
    kept = {path.name for path in model.iterdir()} - {"model.safetensors"}
    assert kept <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(("name", "inputs"), [("vit", "images"), ("t5", "builtin")])
def test_rest_of_a_given_time_is_a_training(
    request, apt, model_of, tmp_path, name, inputs, monkeypatch
):
    """At most as many samples are read as there are."""
    monkeypatch.setattr(recovery, "_steps_in", lambda *_: (6, 2, 2))
    source = inputs if inputs == "builtin" else request.getfixturevalue(inputs)
    result = prune(apt, model_of(name), source, "--seqlen", 32, "--minutes", 9)
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "out" / "apt_report.json").read_text())
    assert report["recovery"] or report["problems"]  # a random model need not become better
    assert "samples, then distillation" in " ".join(result.err.split())


@pytest.mark.parametrize(("name", "inputs"), [("vit", "images"), ("t5", "builtin")])
def test_a_streamed_run_writes_the_same_bytes(request, apt, model_of, tmp_path, name, inputs):
    source = inputs if inputs == "builtin" else request.getfixturevalue(inputs)
    for output, more in (("out", ()), ("streamed", ("--stream",))):
        result = prune(apt, model_of(name), source, *more, output=output)
        assert result.code == 0, result.err
    files = [tmp_path / each / "model.safetensors" for each in ("out", "streamed")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(("inputs", "generated"), [("builtin", True), ("pairs", False)])
def test_a_model_writes_the_second_texts_that_are_missing(
    request, model_of, tmp_path, inputs, generated
):
    source = inputs if inputs == "builtin" else str(request.getfixturevalue(inputs))
    run = PruneRun(
        model=str(model_of("t5")), pattern="2:4", method="ss", calibration=source, samples=8,
        output=tmp_path / "out",
    )  # fmt: skip
    texts = list[str]()
    run_task(run, status=texts.append)
    assert ("generating targets" in texts) == generated
    assert changed_tensors(model_of("t5"), tmp_path / "out") == 32


@pytest.mark.parametrize(("name", "count"), [("vit", 12), ("wav2vec2", 12), ("whisper", 32)])
def test_embedded_pictures_and_sounds_are_the_default(apt, model_of, tmp_path, name, count):
    options = ("--pattern", "2:4", "--method", "ss", "--samples", 24, "--eval", "builtin")
    result = apt("prune", model_of(name), *options, "-o", "out")
    assert result.code == 0, result.err
    assert "calibration: builtin (default)" in result.err
    assert changed_tensors(model_of(name), tmp_path / "out") == count


def refused(result, tmp_path, message):
    assert result.code == 2
    lines = result.err.strip().splitlines()
    assert message in lines[-1]
    assert not any(line.startswith("Traceback") for line in lines)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("vit", "builtin:code", "builtin:code has texts, and the model takes images; give a"),
        ("vit", "pairs.jsonl", "pairs.jsonl has texts, and the model takes images"),
        ("vit", "empty", "empty has no images; give a folder of"),
        ("t5", "images", "images is a folder, and texts are read from one file"),
        ("vit", "images", "images has 12 images, but 20 are needed"),
    ],
)
def test_other_inputs_are_refused(apt, model_of, images, pairs, tmp_path, name, source, message):
    (tmp_path / "empty").mkdir()
    result = prune(apt, model_of(name), source, samples=20)
    refused(result, tmp_path, message)


def test_an_unreadable_file_is_refused(apt, model_of, images, tmp_path):
    (images / "a" / "broken.jpg").write_bytes(b"no image")
    result = prune(apt, model_of("vit"), images, samples=13)
    refused(result, tmp_path, "broken.jpg cannot be read as an image")


@pytest.mark.parametrize("fault", [{"rate": 8000}, {"channels": 2}])
def test_other_sounds_are_refused(apt, model_of, sounds, tmp_path, fault):
    write_wave(sounds / "other.wav", **fault)
    result = prune(apt, model_of("wav2vec2"), sounds, samples=13)
    refused(result, tmp_path, "and the model takes 1 channel of 16,000 Hz; convert it")


def test_a_model_without_a_processor(apt, model_of, images, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for path in model_of("vit").iterdir():
        if path.name != "preprocessor_config.json":
            (model / path.name).write_bytes(path.read_bytes())
    refused(prune(apt, model, images), tmp_path, "the image processor of")


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("vit", "PIL", "needs the package pillow; pip install 'apt-prune[vision]'"),
        ("whisper", "soundfile", "needs the package soundfile; pip install 'apt-prune[speech]'"),
    ],
)
def test_a_missing_package(monkeypatch, apt, model_of, images, tmp_path, name, module, message):
    find = processors.find_spec
    monkeypatch.setattr(processors, "find_spec", lambda n: None if n == module else find(n))
    refused(prune(apt, model_of(name), images), tmp_path, message)
