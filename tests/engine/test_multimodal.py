"""Multimodal checkpoints: the language model is pruned, and all other tensors keep their bytes."""

import json
from importlib import import_module

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.helpers import ROOT, TEXT
from tests.helpers.releases import needs

pytestmark = needs("transformers", "5.20", "some types of models")
KINDS = ["qwen3_5", "gemma3", "llava", "qwen2_5_vl", "mllama"]
IMAGES = {"vision_config": {"image_size": 32, "patch_size": 16}}  # of four patches
SMALL = {"llava": IMAGES, "gemma3": {**IMAGES, "mm_tokens_per_image": 4}}
FOR_IMAGES = ("visual", "vision", "projector", "cross_attn")
DATA = ("--pattern", "2:4", "--calibration", TEXT, "--samples", 4, "--seqlen", 32)


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory, tokenizer):
    """A function that writes a random checkpoint of a multimodal type."""
    made = {}

    def write(kind):
        if kind not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.syspath_prepend(ROOT / "benchmarks")
                words = {"text_config": {"vocab_size": len(tokenizer)}, **SMALL.get(kind, {})}
                model = import_module("tiny").model(kind, image=True, **words)
            made[kind] = tmp_path_factory.mktemp(kind)
            model.save_pretrained(made[kind])
            tokenizer.save_pretrained(made[kind])
            (made[kind] / "preprocessor_config.json").write_text("{}")
        return made[kind]

    return write


@pytest.mark.parametrize("kind", KINDS)
def test_language_model_is_pruned_and_other_tensors_keep_their_bytes(multimodal, apt, kind):
    folder, tensors = multimodal(kind), {}
    for name, how in (("whole", ()), ("streamed", ("--stream",))):
        done = apt("prune", folder, *DATA, "--effort", "fast", *how, "-o", name)
        assert done.code == 0, done.err
        tensors[name] = load_file(f"{name}/model.safetensors")
    before = load_file(folder / "model.safetensors")
    assert f"adapter: auto (default, since none is for type '{kind}' alone)" in done.err
    assert tensors["whole"].keys() == tensors["streamed"].keys() == before.keys()
    changed = {n for n, t in before.items() if not torch.equal(t, tensors["whole"][n])}
    assert all(torch.equal(t, tensors["streamed"][n]) for n, t in tensors["whole"].items())
    assert changed
    assert not [name for name in changed if any(part in name for part in FOR_IMAGES)]
    config = json.loads((folder / "config.json").read_text())
    with open("whole/config.json") as file:
        assert json.load(file)["architectures"] == config["architectures"]
    with open("whole/preprocessor_config.json") as file:
        assert file.read() == "{}"
    kept = getattr(transformers, config["architectures"][0]).from_pretrained("whole")
    assert kept(torch.arange(8).unsqueeze(0)).logits.isfinite().all()
    assert apt("verify", "whole", "--pattern", "2:4").code == 0


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_pruned_multimodal_model_runs_on_images(multimodal, apt, kind):
    folder = multimodal(kind)
    assert apt("prune", folder, *DATA, "--method", "wanda", "-o", "out").code == 0
    open_whole = transformers.AutoModelForImageTextToText.from_pretrained
    logits = [with_image(open_whole(place)) for place in (folder, "out")]
    assert all(each.isfinite().all() for each in logits)
    assert not torch.equal(*logits)


@torch.no_grad()
def with_image(model):
    """The logits of some tokens after an image."""
    config = model.config
    size, patch = config.vision_config.image_size, config.vision_config.patch_size
    count = getattr(config, "mm_tokens_per_image", None) or (size // patch) ** 2
    ids = [config.image_token_id] * count + list(range(8))
    pixels = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    return model.eval()(input_ids=torch.tensor([ids]), pixel_values=pixels).logits


def test_check_passes_on_a_multimodal_model(multimodal, apt):
    done = apt("check", "auto", multimodal("gemma3"))
    assert "Traceback" not in done.err
    assert done.code == 0, done.out
