"""The towers of multimodal checkpoints: `--stack vision` and `--stack audio`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.helpers import TEXT
from tests.helpers.interrupted import PLACES, KilledError, cut, weights
from tests.helpers.releases import needs
from tests.helpers.towers import PROCESSORS, write_multimodal

pytestmark = needs("transformers", "5.20", "some types of models")
TOWERS = {
    "llava": ("vision_tower.", 12),
    "gemma3": ("vision_tower.", 12),
    "idefics3": ("model.vision_model.", 12),
    "qwen2_5_vl": ("visual.", 10),
}
VISION = ("--stack", "vision", "--pattern", "2:4", "--method", "ss", "--samples", 8)
LANGUAGE = ("--pattern", "2:4", "--method", "ss", "--calibration", TEXT, "--samples", 4,
    "--seqlen", 32)  # fmt: skip


@pytest.fixture(scope="module")
def model_of(tmp_path_factory, tokenizer):
    """A function that writes a tiny checkpoint of a type once, and returns its directory."""
    made = {}

    def write(kind):
        if kind not in made:
            made[kind] = write_multimodal(kind, tmp_path_factory.mktemp(kind), tokenizer)
        return made[kind]

    return write


def done(apt, *command):
    result = apt(*command)
    assert result.code == 0, result.err
    return result


def read(path):
    return json.loads(Path(path).read_text("utf-8"))


def changed(before, after):
    """The names of the tensors that differ between two directories."""
    first, second = (load_file(f"{place}/model.safetensors") for place in (before, after))
    assert first.keys() == second.keys()
    return {name for name, tensor in first.items() if not torch.equal(tensor, second[name])}


@pytest.mark.parametrize("kind", TOWERS)
def test_the_tower_is_pruned_and_all_other_tensors_keep_their_bytes(model_of, apt, kind):
    model, (prefix, count) = model_of(kind), TOWERS[kind]
    done(apt, "prune", model, *VISION, "-o", "whole")
    done(apt, "prune", model, *VISION, "--stream", "-o", "streamed")
    names, tensors = changed(model, "whole"), load_file("whole/model.safetensors")
    assert len(names) == count
    assert all(name.startswith(prefix) for name in names)
    for name in names:
        assert (tensors[name].unflatten(1, (-1, 4)).count_nonzero(2) == 2).all()
    assert not changed("whole", "streamed")
    assert (model / "config.json").read_bytes() == Path("whole/config.json").read_bytes()
    report = read("whole/apt_report.json")
    assert report["options"]["stacks"] == ["vision"]
    assert {s["name"].split(".")[0] for s in report["sites"]} == {"model"}  # names of the whole


def test_a_checkpoint_in_bf16_keeps_its_dtypes_and_bytes(model_of, apt, tmp_path):
    shutil.copytree(model_of("llava"), tmp_path / "bf16")
    tensors = load_file(tmp_path / "bf16/model.safetensors")
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(halves, tmp_path / "bf16/model.safetensors", {"format": "pt"})
    done(apt, "prune", "bf16", *VISION, "-o", "whole")
    done(apt, "prune", "bf16", *VISION, "--stream", "-o", "streamed")
    assert len(changed("bf16", "whole")) == 12
    assert not changed("whole", "streamed")
    after = load_file("whole/model.safetensors")
    assert {name: t.dtype for name, t in after.items()} == {n: t.dtype for n, t in halves.items()}


@pytest.mark.parametrize("kind", TOWERS)
def test_the_logits_for_a_picture_change_through_the_tower_alone(model_of, apt, kind):
    done(apt, "prune", model_of(kind), *VISION, "-o", "out")
    open_whole = transformers.AutoModelForImageTextToText.from_pretrained
    dense, pruned = open_whole(model_of(kind)), open_whole("out")
    before, after = (logits(each, kind) for each in (dense, pruned))
    assert not torch.equal(before, after)
    for path in ("vision_tower", "vision_model", "visual"):
        if (tower := getattr(pruned.model, path, None)) is not None:
            getattr(dense.model, path).load_state_dict(tower.state_dict())
    assert torch.equal(logits(dense, kind), after)


@torch.no_grad()
def logits(model, kind):
    """The logits of some tokens after a picture."""
    made = PROCESSORS[kind]()(images=picture(), return_tensors="pt")
    names = ("pixel_values", "pixel_attention_mask", "image_grid_thw")
    inputs = {name: made[name] for name in names if name in made}
    features = model.model.get_image_features(**inputs).pooler_output
    count = sum(each.flatten(0, -2).shape[0] for each in features)
    ids = torch.tensor([[model.config.image_token_id] * count + list(range(8))])
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    return model.eval()(input_ids=ids, **inputs).logits


def picture():
    draw = torch.Generator().manual_seed(0)
    values = torch.randint(0, 255, (48, 64, 3), generator=draw, dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def test_a_folder_of_pictures_calibrates_by_the_default_method(model_of, apt, tmp_path):
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        picture().rotate(90 * number).save(tmp_path / f"pictures/{number}.png")
    command = ("--stack", "vision", "--calibration", "pictures", "--samples", 4)
    done(apt, "prune", model_of("qwen2_5_vl"), *command, "--eval", "pictures", "-o", "out")
    report = read("out/apt_report.json")
    assert report["scores"]["before"]["similarity"] == pytest.approx(1)
    assert report["scores"]["after"]["similarity"] < 1
    assert report["calibration"]["shape"][0] == 4


def test_a_second_run_prunes_the_language_model_of_the_first_output(model_of, apt):
    model = model_of("llava")
    done(apt, "prune", model, *VISION, "-o", "first")
    done(apt, "prune", "first", *LANGUAGE, "-o", "both")
    done(apt, "prune", model, *LANGUAGE, "-o", "language")
    vision, language = changed(model, "first"), changed(model, "language")
    assert changed(model, "both") == vision | language
    assert not changed("first", "both") & vision
    assert not changed("language", "both") - vision
    assert "28 of 28 sites" in done(apt, "verify", "both").out
    assert "12 of 12" in done(apt, "verify", "both", "--stack", "vision", "--pattern", "2:4").out
    done(apt, "reapply", "both", model, "-o", "again")  # the zeros of both runs
    assert changed(model, "again") == vision | language


def test_an_interrupted_run_is_resumed(model_of, apt, monkeypatch):
    command = ("prune", model_of("idefics3"), *VISION, "--stream")
    done(apt, *command, "-o", "whole")
    with monkeypatch.context() as patch:
        cut(patch, PLACES["journal"], 2, KilledError())
        with pytest.raises(KilledError):
            apt(*command, "-o", "out")
    done(apt, *command, "-o", "out", "--resume")
    assert weights("out") == weights("whole")


def test_commands_that_read_the_result(model_of, apt):
    model = model_of("llava")
    done(apt, "prune", model, *VISION, "--pack", "packed", "--save-masks", "-o", "out")
    for place in ("out", "packed"):
        assert "12 of 12 sites meet their pattern" in done(apt, "verify", place).out
    found = done(apt, "eval", "out", "--dense", model, "--stack", "vision", "--samples", 8)
    assert "similarity" in found.out
    done(apt, "unpack", "packed", "-o", "unpacked")
    assert not changed("out", "unpacked")
    done(apt, "reapply", "out/apt_masks.safetensors", model, "-o", "again")
    assert changed(model, "again") == changed(model, "out")
    steps = ("--calibration", TEXT, "--steps", 1, "--dense", model)
    assert "out has no zeros" in apt("recover", "out", *steps, "-o", "recovered").err


def test_inspect_shows_the_stacks(model_of, apt):
    assert (
        "stacks, for apt-prune prune --stack: decoder, vision"
        in done(apt, "inspect", model_of("llava")).out
    )
    assert json.loads(done(apt, "inspect", model_of("llava"), "--json").out)["stacks"] == [
        "decoder",
        "vision",
    ]
    found = json.loads(done(apt, "inspect", model_of("llava"), "--stack", "vision", "--json").out)
    assert found["class"] == "CLIPVisionModel"
    assert found["blocks"][0] == "model.vision_tower.encoder.layers.0"


def test_the_audio_tower_is_pruned_on_sounds(model_of, apt):
    pytest.importorskip("soundfile", reason="the extra speech is not installed")
    command = ("--stack", "audio", "--pattern", "2:4", "--method", "ss", "--samples", 4)
    done(apt, "prune", model_of("voxtral"), *command, "-o", "out")
    names = changed(model_of("voxtral"), "out")
    assert len(names) == 12
    assert all(name.startswith("audio_tower.") for name in names)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--stack", "decoder"], "vision and decoder are pruned on different samples, and a run "
            "has one kind; run twice: first with stack vision, then on its output"),
        (["--minutes", 1], "minutes needs the language model, and the run prunes the vision tower"),
        (["--export", "m.gguf"], "export needs the language model"),
        (["--dtype", "float16"], "the vision tower keeps the dtype of its checkpoint"),
        (["--own-samples", 2], "own samples has no effect on CLIPVisionModel"),
        (["--calibration", "builtin:code"], "builtin:code has texts, and the model takes images"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_for_a_tower_is_refused_in_one_line(model_of, apt, more, message):
    result = apt("prune", model_of("llava"), *VISION, *more, "-o", "out")
    assert result.code == 2
    assert message in result.err.splitlines()[-1]


@pytest.mark.parametrize("command", ["prune", "inspect", "verify", "eval"])
def test_an_unknown_tower_is_refused_with_the_known_ones(model_of, apt, command):
    more = ("--pattern", "2:4") if command in ("prune", "verify") else ()
    result = apt(command, model_of("llava"), "--stack", "audio", *more)
    assert result.code == 2
    assert "vision" in result.err.splitlines()[-1]
