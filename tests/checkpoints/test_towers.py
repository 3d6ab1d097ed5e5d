"""The towers of multimodal models, and the samples that they take."""

import copy

import pytest
import torch
from apt_adapters.example_inputs import example_inputs

from apt import AptError
from apt.adapter.recording import in_one_sequence
from apt.checkpoints.towers import TowerInputs, tower_of, towers_of
from tests.helpers.releases import needs
from tests.helpers.stacked import stacked_model
from tests.helpers.towers import PROCESSORS, multimodal_model

pytestmark = needs("transformers", "5.20", "some types of models")


def inputs_of(model, stack="vision", dtype=torch.float32):
    return TowerInputs(model.config, stack, dtype)


@pytest.fixture
def pixels():
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 255, (48, 64, 3), generator=draw, dtype=torch.uint8).numpy()


@pytest.mark.parametrize(
    ("kind", "towers"),
    [
        ("llava", {"vision": "model.vision_tower"}),
        ("qwen2_5_vl", {"vision": "model.visual"}),
        ("voxtral", {"audio": "model.audio_tower"}),
    ],
)
def test_the_towers_of_multimodal_models(kind, towers):
    assert towers_of(multimodal_model(kind, 256)) == towers


@pytest.mark.parametrize("name", ["bert", "t5", "clip"])
def test_other_models_have_no_towers(name):
    assert towers_of(stacked_model(name)) == {}


def test_a_tower_has_the_names_of_the_model_and_runs_as_its_module_does():
    model = multimodal_model("llava", 256)
    tower, values = tower_of(model, "vision"), torch.rand(2, 3, 32, 32)
    names = dict(model.named_parameters())
    assert {name.split(".")[1] for name, _ in tower.named_parameters()} == {"vision_tower"}
    assert all(parameter is names[name] for name, parameter in tower.named_parameters())
    expected = model.model.vision_tower(pixel_values=values).last_hidden_state
    assert torch.equal(tower(pixel_values=values).last_hidden_state, expected)
    assert tower.config is model.model.vision_tower.config
    copied = copy.deepcopy(tower)
    assert copied.base_model is copied.get_submodule(tower.path)
    assert copied.base_model is not tower.base_model
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        tower.nothing_of_this_name  # noqa: B018


def test_the_samples_are_the_arguments_of_the_model_s_own_call(pixels):
    """The tower runs on them as in a run of the model on the picture."""
    model = multimodal_model("qwen2_5_vl", 256)
    made = PROCESSORS["qwen2_5_vl"]()(images=pixels, return_tensors="pt")
    (sample,) = inputs_of(model)(made)
    assert {n: tuple(v.shape) for n, v in sample.items()} == {
        "hidden_states": (len(made["pixel_values"]), 1176),
        "grid_thw": (3,),
    }
    calls = []
    handle = model.model.visual.register_forward_hook(lambda *call: calls.append(call[-1]))
    model.model.get_image_features(**made)
    handle.remove()
    tower = tower_of(model, "vision")
    batch = {name: torch.stack([value, value]) for name, value in sample.items()}
    first, second = tower(**batch).last_hidden_state.chunk(2)
    torch.testing.assert_close(first, calls[0].last_hidden_state)
    torch.testing.assert_close(second, first)


def test_each_tile_of_a_picture_is_a_sample(pixels):
    model = multimodal_model("idefics3", 256)
    made = PROCESSORS["idefics3"]()(images=pixels, return_tensors="pt")
    samples = inputs_of(model)(made)
    assert len(samples) == made["pixel_values"].shape[1] > 1
    assert {tuple(sample["pixel_values"].shape) for sample in samples} == {(3, 32, 32)}
    assert samples[0].keys() == {"pixel_values", "patch_attention_mask"}


@pytest.mark.parametrize("name", ["grid_thw", "image_grid_thw", "image_grid_hw"])
def test_patches_of_several_pictures_are_one_sequence(name):
    sizes = torch.tensor([[[1, 2, 4]], [[1, 2, 4]]])[..., 3 - (2 if name.endswith("_hw") else 3) :]
    patches = torch.rand(2, 8, 12)
    joined = in_one_sequence({"pixel_values": patches, name: sizes[:, 0]})
    assert torch.equal(joined["pixel_values"], patches.flatten(0, 1))
    assert torch.equal(joined[name], sizes[:, 0])
    both = {"input_ids": torch.ones(2, 5), "pixel_values": patches, name: sizes[:, 0]}
    assert in_one_sequence(both) is both  # a model of images and text joins them itself


def test_padding_of_patches_is_left_out():
    model = multimodal_model("lfm2_vl", 256)
    vision = model.config.vision_config
    draw = torch.Generator().manual_seed(0)
    made = {
        "pixel_values": torch.randn(1, 10, 3 * vision.patch_size**2, generator=draw),
        "spatial_shapes": torch.tensor([[2, 4]]),
        "pixel_attention_mask": torch.tensor([[1] * 8 + [0] * 2]),
    }
    (sample,) = inputs_of(model)(made)
    assert len(sample["pixel_values"]) == len(sample["pixel_attention_mask"]) == 8
    tower = tower_of(model, "vision")
    padded, cut = (
        tower(**each).last_hidden_state[0]
        for each in (made, {name: value[None] for name, value in sample.items()})
    )
    torch.testing.assert_close(padded[:8], cut)


def test_the_mask_of_a_sound_has_all_frames():
    mask = torch.tensor([[1] * 60 + [0] * 40])
    make = inputs_of(multimodal_model("audioflamingo3", 256), "audio")
    (sample,) = make({"input_features": torch.rand(1, 128, 100), "attention_mask": mask})
    assert torch.equal(sample["input_features_mask"], mask[0])  # of the extractor's other name
    assert sample["input_features"].shape == (128, 100)


def test_auto_examines_a_tower_with_the_inputs_that_its_own_processor_makes():
    model = multimodal_model("llava", 256)
    made = {"pixel_values": torch.rand(2, 3, 32, 32)}
    found = example_inputs(tower_of(model, "vision", lambda samples: made))
    assert torch.equal(found["pixel_values"], made["pixel_values"])
    wrong = {"pixel_values": torch.rand(2, 5, 32, 32)}  # the tower does not run on it
    assert example_inputs(tower_of(model, "vision", lambda samples: wrong)).keys() == made.keys()


def test_samples_have_the_dtype_in_which_the_tower_computes(pixels):
    model = multimodal_model("llava", 256)
    made = PROCESSORS["llava"]()(images=pixels, return_tensors="pt")
    (sample,) = inputs_of(model, dtype=torch.bfloat16)(made)
    assert sample["pixel_values"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "made", "message"),
    [
        ("llava", {}, "CLIPVisionModel takes pixel_values, which cannot be made"),
        ("qwen2_5_vl", {"pixel_values": torch.zeros(4, 1176)}, "takes grid_thw, which cannot"),
        ("idefics3", {"pixel_values": torch.zeros(1, 1)}, "does not reach its tower: "),
        ("lfm2_vl", {"pixel_values": torch.zeros(2, 4, 8), "spatial_shapes": torch.ones(1, 2),
            "pixel_attention_mask": torch.ones(2, 4)},
            "the samples of a tower have different lengths: pixel_values, "),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_an_error_of_one_line(kind, made, message):
    with pytest.raises(AptError, match=message) as error:
        inputs_of(multimodal_model(kind, 256))(made)
    assert error.value.hint == "this tower cannot be pruned"
