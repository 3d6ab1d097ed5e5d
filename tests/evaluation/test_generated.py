import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DeformableDetrConfig,
    DeformableDetrModel,
    ResNetConfig,
    T5Config,
    T5Model,
)

from apt import AptError
from apt.adapter import Samples
from apt.evaluation.generated import TARGET, changes, greedy_outputs, lacks_outputs, with_outputs
from apt.evaluation.outputs import dense_outputs, token_changes

words = st.lists(st.integers(0, 3), max_size=6)


@pytest.fixture(scope="module")
def bart():
    torch.manual_seed(0)
    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64,
            decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4,
            max_position_embeddings=24, decoder_start_token_id=2, forced_eos_token_id=None,
        )
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


@pytest.fixture(scope="module")
def samples():
    draw = torch.Generator().manual_seed(0)
    lengths = [6, 9, 6, 12, 9]
    return Samples(
        [{"input_ids": torch.randint(3, 64, (n,), generator=draw)} for n in lengths]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other", "count"),
    [("", "", 0), ("abc", "abc", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("ab", "ba", 2)],
)
def test_changes(one, other, count):
    assert changes(one, other) == changes(other, one) == count


@given(words, words, words)
def test_changes_are_a_distance(one, other, third):
    assert (changes(one, other) == 0) == (one == other)
    assert changes(one, other) <= changes(one, third) + changes(third, other)


def test_an_output_is_what_is_ranked_first_token_by_token(bart, samples):
    for sample, output in zip(samples, greedy_outputs(bart, samples), strict=True):
        ids = torch.tensor([2])
        while len(ids) < 21 and (len(ids) == 1 or ids[-1] != 2):
            with torch.no_grad():
                logits = bart(input_ids=sample["input_ids"][None], decoder_input_ids=ids[None])
            ids = torch.cat([ids, logits.logits[0, -1:].argmax(-1)])
        assert output.tolist() == ids.tolist()


def test_a_decoder_reads_all_tokens_of_an_output_but_the_last(bart, samples):
    outputs = [torch.arange(2, n) for n in (8, 9, 14, 30, 3)]
    targets = [sample[TARGET].tolist() for sample in with_outputs(samples, outputs)]
    assert targets == [[2, 3, 4, 5, 6], [2, 3, 4, 5, 6, 7], [*range(2, 12)], [*range(2, 26)], []]


def test_models_without_a_head_cannot_write(samples):
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    with pytest.raises(AptError, match="the decoder of T5Model needs a second text"):
        lacks_outputs(T5Model(config), samples)


def test_detectors_whose_decoder_reads_queries_need_no_second_text():
    """This one fails on a sample alone: a group of one value has no variance."""
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"]
    )
    config = DeformableDetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=backbone, d_model=32,
        num_feature_levels=1, encoder_layers=1, decoder_layers=1, num_queries=4,
        encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=4,
        decoder_attention_heads=4,
    )  # fmt: skip
    model = DeformableDetrModel(config).eval()
    images = Samples([{"pixel_values": torch.rand(3, 8, 8)}] * 2)
    with pytest.raises(ValueError, match="more than 1 value"):
        model(images[0]["pixel_values"][None])
    assert not lacks_outputs(model, images)


def test_token_changes_count_against_the_dense_model(bart, samples):
    dense, completed = dense_outputs(bart, samples)
    assert TARGET in completed.names
    assert token_changes(bart, completed, dense) == 0
    rotated = samples.with_samples([*samples[1:], samples[0]])
    written = [ids.tolist() for ids in dense.written]
    count = sum(map(changes, [*written[1:], written[0]], written))
    expected = count / sum(map(len, written))
    assert token_changes(bart, rotated, dense) == pytest.approx(expected)
    assert expected > 0
