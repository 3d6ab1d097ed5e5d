"""The adapter ``auto`` on models of one or several stacks."""

import pytest
import torch
from apt_adapters.auto import AutoAdapter
from apt_adapters.bart import BartAdapter
from apt_adapters.chains import find_chains
from apt_adapters.example_inputs import example_inputs
from apt_adapters.tracing import Trace
from apt_adapters.wav2vec2 import Wav2Vec2Adapter
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BartConfig,
    BartForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    DetrConfig,
    DetrForObjectDetection,
    PerceiverConfig,
    PerceiverForMaskedLM,
    ResNetConfig,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
    WavLMConfig,
    WavLMModel,
)

import apt
from apt.adapter import Samples
from apt.errors import AptError
from tests.helpers.families import STACKED

_SIDES = {"encoder": 2, "decoder": 2}
_TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def bart():
    torch.manual_seed(0)
    fields = {f"{side}_layers": count for side, count in _SIDES.items()}
    fields |= {f"{side}_attention_heads": 4 for side in _SIDES}
    fields |= {f"{side}_ffn_dim": 64 for side in _SIDES}
    config = BartConfig(
        vocab_size=64, d_model=32, max_position_embeddings=40, pad_token_id=1,
        decoder_start_token_id=2, bos_token_id=0, eos_token_id=2, forced_eos_token_id=2, **fields,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


def vit():
    torch.manual_seed(0)
    return ViTModel(ViTConfig(**_TOWER, intermediate_size=64, image_size=16, patch_size=4)).eval()


def samples_for(model, count=8):
    inputs = example_inputs(model, count)
    return Samples([{name: each[i] for name, each in inputs.items()} for i in range(count)])


def described(adapter, model):
    """What an adapter says of the sites of every block, without the names of inputs."""
    return [
        {s.name: (s.residual, s.crossing, s.calls) for s in adapter.sites(block)}
        for _, block in adapter.blocks(model)
    ]


def test_encoder_and_decoder_have_the_sites_that_are_declared():
    model = bart()
    found, declared = AutoAdapter(), BartAdapter()
    assert [name for name, _ in found.stacks(model)] == ["encoder", "decoder"]
    assert described(found, model) == described(declared, model)


def test_crossing_sites_share_the_input_from_the_first_stack():
    model = bart()
    adapter = AutoAdapter()
    _, block = adapter.blocks(model)[-1]
    crossing = [site for site in adapter.sites(block) if site.crossing]
    assert {site.name for site in crossing} == {"encoder_attn.k_proj", "encoder_attn.v_proj"}
    assert len({site.input for site in crossing}) == 1
    assert {site.stack for site in crossing} == {0}


def test_results_equal_those_of_the_declared_adapter():
    one, other = bart(), bart()
    for model, adapter in ((one, "auto"), (other, "bart")):
        apt.prune(model, samples_for(model), pattern="2:4", adapter=adapter, method="ss")
    for value, expected in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(value, expected)


def test_towers_are_stacks():
    config = CLIPConfig(
        text_config={**_TOWER, "vocab_size": 64, "intermediate_size": 64, "eos_token_id": 2,
                     "max_position_embeddings": 20},
        vision_config={**_TOWER, "intermediate_size": 64, "image_size": 16, "patch_size": 4},
        projection_dim=16,
    )  # fmt: skip
    stacks = AutoAdapter().stacks(CLIPModel(config).eval())
    assert {name: len(blocks) for name, blocks in stacks} == {"vision": 2, "text": 2}


def siglip2():
    config = Siglip2VisionConfig(**_TOWER, intermediate_size=64, patch_size=4, num_patches=16)
    return Siglip2VisionModel(config).eval()


def perceiver():
    config = PerceiverConfig(
        num_latents=6,
        d_latents=32,
        d_model=32,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=4,
        num_cross_attention_heads=4,
        vocab_size=64,
        max_position_embeddings=20,
    )
    return PerceiverForMaskedLM(config).eval()


def wavlm():
    config = WavLMConfig(
        **_TOWER,
        intermediate_size=64,
        conv_dim=(16, 16),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    return WavLMModel(config).eval()


@pytest.mark.parametrize(
    ("made", "shapes"),
    [
        (siglip2, {"pixel_values": (2, 16, 48), "spatial_shapes": (2, 2)}),
        (perceiver, {"inputs": (2, 16)}),
        (wavlm, {"input_values": (2, 6400)}),
    ],
)
def test_models_of_patches_of_ids_and_of_waves_are_one_stack(made, shapes):
    torch.manual_seed(0)
    model = made()
    inputs = example_inputs(model)
    assert {name: inputs[name].shape for name in shapes} == shapes
    ((name, blocks),) = AutoAdapter().stacks(model)
    assert name in ("encoder", "vision")  # before transformers 5, SigLIP 2 has a vision_model
    assert len(blocks) == 2
    before = {name: value.clone() for name, value in model.named_parameters()}
    report = apt.prune(model, samples_for(model), pattern="2:4", adapter="auto", method="ss")
    changed = {n for n, value in model.named_parameters() if not torch.equal(value, before[n])}
    assert changed == {f"{site.name}.weight" for site in report.sites}
    assert len(changed) >= 12


def test_blocks_of_wavlm_have_the_sites_that_are_declared():
    model = wavlm()
    assert described(AutoAdapter(), model) == described(Wav2Vec2Adapter(), model)


def test_stages_with_other_numbers_of_rows_are_stacks():
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=2
    )
    model = SwinModel(config).eval()
    stacks = AutoAdapter().stacks(model)
    assert [len(blocks) for _, blocks in stacks] == [2, 1]
    apt.prune(model, samples_for(model), pattern="2:4", adapter="auto", method="ss")


def test_model_without_weights_has_the_same_sites():
    with torch.device("meta"):
        skeleton = vit()
    assert described(AutoAdapter(), skeleton) == described(AutoAdapter(), vit())


def test_shared_blocks_are_refused_in_one_line():
    config = AlbertConfig(**_TOWER, vocab_size=64, embedding_size=16, intermediate_size=64)
    with pytest.raises(
        AptError, match=r"albert_layer_groups.0 is called 2 times in a run"
    ) as refused:
        AutoAdapter().blocks(AlbertForMaskedLM(config).eval())
    assert refused.value.hint == "APT prunes blocks that are called once"


def test_matrices_that_multiply_zeros_are_left_dense_and_named(apt, tmp_path):
    """The queries of an object detector begin as zeros; it reads no text at all."""
    body = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic",
        out_features=["stage2"],
    )  # fmt: skip
    config = DetrConfig(
        use_timm_backbone=False, backbone_config=body, backbone=None, d_model=32, num_queries=8,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, use_pretrained_backbone=False,
    )  # fmt: skip
    torch.manual_seed(0)
    DetrForObjectDetection(config).save_pretrained(tmp_path / "detr")
    done = apt("inspect", tmp_path / "detr")
    assert done.code == 0, done.err
    assert "left dense: 2 matrices whose inputs are only zeros" in done.err
    assert "model.decoder.layers.0.self_attn.v_proj" in done.err
    assert "samples, each as 2048 tokens" in done.out


@pytest.mark.skipif(not STACKED, reason="transformers 5 has the blocks in other places")
def test_blocks_that_keep_a_value_between_calls_are_refused():
    """A replay of such a block returns something else."""
    model = vit()

    class Counting(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block, self.calls = block, 0

        def forward(self, hidden_states, *args, **kwargs):
            self.calls += 1
            return self.block(hidden_states * self.calls, *args, **kwargs)

    model.layers = nn.ModuleList([Counting(block) for block in model.layers])
    inputs = example_inputs(vit())
    with pytest.raises(AptError, match="returns something else in a replay"):
        find_chains(model, inputs)


@pytest.mark.skipif(not STACKED, reason="transformers 5 has the blocks in other places")
def test_chain_with_a_module_between_its_blocks_is_split():
    """What the model does between two blocks is done by the model itself."""
    model = vit()

    class Between(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

        def forward(self, hidden_states):
            return self.layers[1](self.layers[0](hidden_states) * 2)

    model.base_model_prefix = ""
    model.forward = lambda pixel_values: between(model.embeddings(pixel_values))
    between = Between(model.layers)
    chains = find_chains(model, example_inputs(vit()))
    assert [len(names) for _, names in chains.stacks] == [1, 1]


@pytest.mark.skipif(not STACKED, reason="transformers 5 has the blocks in other places")
def test_module_that_reads_the_stream_beside_the_next_block_splits_no_chain():
    """Some encoders of images have mergers that read what single blocks return."""
    model = vit()
    model.base_model_prefix = ""
    model.mergers = nn.ModuleList([nn.Linear(32, 128)])

    def forward(pixel_values):
        first = model.layers[0](model.embeddings(pixel_values))
        merged = model.mergers[0](first)
        return model.layers[1](first) + 0 * merged.sum()

    inputs, model.forward = example_inputs(vit()), forward
    assert find_chains(model, inputs).stacks == [("encoder", ["layers.0", "layers.1"])]


@pytest.mark.skipif(not STACKED, reason="transformers 5 has the blocks in other places")
def test_stream_may_be_passed_as_hidden_state():
    """As in the encoder of images of Llama 4."""
    model = vit()

    class Renamed(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, hidden_state, scale=None):
            return (self.block(hidden_state) * scale,)

    def forward(pixel_values):
        state = model.embeddings(pixel_values)
        for layer in model.layers:
            (state,) = layer(hidden_state=state, scale=0.5)
        return state

    model.base_model_prefix, model.layers = "", nn.ModuleList(map(Renamed, model.layers))
    inputs, model.forward = example_inputs(vit()), forward
    assert [len(names) for _, names in find_chains(model, inputs).stacks] == [2]


@torch.no_grad()
def test_no_address_is_used_again_while_a_block_is_traced():
    """Two inputs at one address would be one input of two sites. A norm returns a tuple."""
    norm, x = nn.LayerNorm(32), torch.randn(2, 16, 32)
    with Trace(norm, x):
        addresses = {norm(x).untyped_storage().data_ptr() for _ in range(50)}
    assert len(addresses) == 50
