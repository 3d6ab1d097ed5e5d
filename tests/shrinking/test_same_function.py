"""A smaller model computes the function of the fitted model, or it is refused."""

import pytest

import apt as library
from apt import ShrinkOptions
from apt.checkpoints.smaller import resized
from apt.errors import AptError
from tests.helpers.releases import needs

pytestmark = needs("transformers", "5.20", "some types of models")


def without_second(tiny, kind):
    size = ShrinkOptions(drop=(1,))
    return library.shrink(tiny.model(kind), tiny.tokens(), size=size, method=None)


@pytest.mark.parametrize(
    ("kind", "config"), [("minicpm3", "MiniCPM3Config"), ("diffllama", "DiffLlamaConfig")]
)
def test_families_that_depend_on_the_position_of_blocks_are_refused(tiny, kind, config):
    with pytest.raises(AptError, match=rf"differ by \d+\.\d+%; {config} may scale by the number"):
        without_second(tiny, kind)


def test_per_layer_fields_of_the_configuration_are_resized(tiny):
    """LFM2 lists the kinds of its layers, and Qwen2-MoE lists the indices of its dense layers."""
    small, _ = without_second(tiny, "lfm2")
    kinds = tiny.config("lfm2").layer_types
    assert small.config.layer_types == [kinds[0], *kinds[2:]]
    mixture = tiny.config("qwen2_moe", mlp_only_layers=[0, 2])
    assert resized(mixture, (), [0, 2, 3], 4).mlp_only_layers == [0, 1]
    deep = tiny.config("deepseek_v3", first_k_dense_replace=2)
    assert resized(deep, (), [1, 2, 3], 4).first_k_dense_replace == 1


def test_cyclic_kinds_and_per_layer_sizes_are_resized(tiny):
    """Recurrent Gemma repeats its list of kinds; Gemma 4 has a mapping by index.

    A block of Recurrent Gemma keeps the state of a batch in an attribute.
    """
    small, _ = without_second(tiny, "recurrent_gemma")
    assert small.config.block_types == ["recurrent", "attention", "recurrent"]
    cyclic = tiny.config("recurrent_gemma", num_hidden_layers=5)
    assert cyclic.block_types == ["recurrent", "recurrent", "attention"]
    kinds = resized(cyclic, (), [0, 2, 3, 4], 5).block_types
    assert kinds == ["recurrent", "attention", "recurrent", "recurrent"]
    sizes = {1: {"head_dim": 16}, 3: {"head_dim": 32}}
    mapped = tiny.config("gemma4_text", per_layer_config=sizes)
    result = resized(mapped, (), [0, 2, 3], 4).to_dict()["per_layer_config"]
    assert {int(index): each for index, each in result.items()} == {2: sizes[3]}


def test_text_part_of_a_multimodal_configuration_is_resized(tiny):
    whole = tiny.config("gemma3")
    small = resized(whole, (), [0, 1, 3], 4)
    assert small.get_text_config().num_hidden_layers == 3
    kinds = whole.get_text_config().layer_types
    assert small.get_text_config().layer_types == [*kinds[:2], kinds[3]]
    assert small.vision_config.to_dict() == whole.vision_config.to_dict()
