"""Text that a model generates: its properties, its use in pruning, and the command line."""

import json
from pathlib import Path

import pytest
import torch
from transformers import BlenderbotConfig, BlenderbotForCausalLM

import apt as library
from apt.evaluation.metrics import perplexity
from apt.text import self_generated
from apt.text.sampling import mixed
from apt.text.self_generated import _Sampling, beside_given
from tests.helpers import TEXT
from tests.helpers.families import FAMILIES, random_model, zoo_model


@pytest.fixture
def command(checkpoint):
    """A run with little text."""
    small = ("--pattern", "2:4", "--seqlen", 32, "--only", "*.0.self_attn.q_proj")
    return ("prune", checkpoint("llama"), *small, "--calibration", TEXT)


@pytest.mark.parametrize("variant", FAMILIES.values())
def test_equal_seeds_generate_equal_text(variant):
    module = random_model(variant).train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again = (library.own_text(module, 3, 40, seed=1) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert module.training
    assert first.shape == (3, 40)
    assert torch.equal(first, again)
    assert not torch.equal(first, library.own_text(module, 3, 40, seed=2))
    assert 0 <= int(first.min()) <= int(first.max()) < module.config.vocab_size


def test_repetition_penalty_of_the_model_does_not_change_own_text():
    model = random_model("llama")
    plain = library.own_text(model, 3, 40)
    own = model.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size = 5.0, 2
    assert torch.equal(library.own_text(model, 3, 40), plain)
    assert model.generation_config is own


def test_long_sample_consists_of_several_sequences(monkeypatch):
    monkeypatch.setattr("apt.text.self_generated._PIECE", 16)
    monkeypatch.setattr("apt.text.self_generated._AT_ONCE", 2)
    tokens = library.own_text(random_model("llama"), 2, 40)
    assert tokens.shape == (2, 40)
    starts = torch.randint(2048, (5, 1), generator=torch.Generator().manual_seed(0))
    assert torch.equal(tokens.flatten()[::16], starts.flatten())


def test_own_text_has_a_low_perplexity():
    model, text, _ = zoo_model("llama", samples=8, seqlen=64)
    own = library.own_text(model.module, 8, 64)
    noise = torch.randint(2048, (8, 64), generator=torch.Generator().manual_seed(0))
    levels = [perplexity(model.module, tokens) for tokens in (own, noise)]
    assert levels[0] < 0.05 * levels[1]
    assert not torch.equal(own, text)


def test_pruning_on_own_text_beats_pruning_on_noise():
    dense, _, held_out = zoo_model("llama", samples=32, seqlen=128)
    own = library.own_text(dense.module, 32, 128)
    noise = torch.randint(2048, (32, 128), generator=torch.Generator().manual_seed(0))
    result = []
    for tokens in (own, noise):
        pruned, _ = library.prune_copy(dense.module, tokens, pattern="1:4", method="ss")
        result.append(perplexity(pruned, held_out))
    assert perplexity(dense.module, held_out) < result[0] < 0.9 * result[1]


@pytest.mark.parametrize(
    ("options", "own", "shape"),
    [
        (("--samples", 6), 2, [8, 32]),
        (("--samples", 6, "--stream"), 0, [6, 32]),
        (("--samples", 6, "--effort", "best"), 2, [8, 32]),
        (("--samples", 6, "--effort", "best", "--own-samples", 0), 0, [6, 32]),
        (("--samples", 6, "--effort", "best", "--layer-wise"), 0, [6, 32]),
        (("--samples", 6, "--effort", "fast", "--own-samples", 3), 3, [9, 32]),
        (("--samples", 0, "--own-samples", 3, "--method", "ss", "--eval", TEXT), 3, [3, 32]),
    ],
)
def test_command_adds_own_samples(options, own, shape, apt, command):
    result = apt(*command, *options, "-o", "out")
    assert result.code == 0, result.err
    calibration = json.loads(Path("out/apt_report.json").read_text())["calibration"]
    assert (calibration["own_samples"], calibration["shape"]) == (own, shape)


def test_given_samples_stay_among_the_mixed_samples(apt, command, monkeypatch):
    seen = []

    def watched(given, own, seed):
        seen.append((given, mixed(given, own, seed)))
        return seen[-1][1]

    monkeypatch.setattr("apt.text.augmentation.mixed", watched)
    given = ("--samples", 6, "--own-samples", 2, "--method", "ss")
    assert apt(*command, *given).code == 0
    [(given, both)] = seen
    rows = both.tolist()
    assert sum(row in rows for row in given.tolist()) == 6
    assert rows[:6] != given.tolist()


def test_mixed_samples_have_the_device_and_dtype_of_the_given_samples():
    given, own = torch.ones(2, 3, dtype=torch.int32), torch.full((1, 3), 2)
    both = mixed(given, own)
    assert both.dtype == torch.int32
    assert sorted(both[:, 0].tolist()) == [1, 1, 2]
    assert mixed(given.to("meta"), own).device.type == "meta"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--own-samples", -1), "own samples is -1; it must be at least 0"),
        (("--samples", 0), "use at least one sample or one own sample (--samples, --own-samples)"),
    ],
)
def test_invalid_numbers_of_samples_are_refused(options, message, apt, command):
    result = apt(*command, *options, "-o", "out")
    assert result.code == 2
    assert message in result.err
    assert not Path("out").exists()


def test_own_text_is_omitted_by_default_if_the_model_cannot_generate(apt, command, monkeypatch):
    monkeypatch.setattr("apt.engine.pruning_plan.writes", lambda module: False)
    result = apt(*command, "--samples", 6, "--effort", "best", "-o", "out")
    assert result.code == 0, result.err
    assert "own samples: 0 (not 2: LlamaForCausalLM cannot generate text)" in result.err
    with pytest.raises(library.AptError, match="Linear cannot generate calibration text") as raised:
        library.own_text(torch.nn.Linear(4, 4), 1, 8)
    assert raised.value.options == ("own_samples",)


def test_model_that_cannot_use_its_cache_generates_text():
    """A decoder of Blenderbot alone, whose cache has no layers in transformers 5.24."""
    config = BlenderbotConfig(
        vocab_size=300, d_model=32, encoder_layers=1, decoder_layers=3, decoder_attention_heads=4,
        decoder_ffn_dim=64, max_position_embeddings=64,
    )  # fmt: skip
    model = BlenderbotForCausalLM(config).eval()
    text = library.own_text(model, 3, 40, seed=1)
    assert text.shape == (3, 40)
    assert text.unique().numel() > 20


def test_own_text_tolerates_nan_logits():
    model = random_model("llama")
    model.get_output_embeddings().weight.data[3] = torch.nan
    assert library.own_text(model, 2, 16).shape == (2, 16)


def test_tokens_are_drawn_with_their_probabilities():
    """40,000 draws: each share is within four standard deviations of its probability."""
    logits = torch.tensor([0.0, -torch.inf, 2.0, 1.0, torch.nan])
    count = 40_000
    chosen = _Sampling(0)(torch.zeros(count, 1), logits.expand(count, -1)).argmax(-1)
    expected = logits.nan_to_num(0.0, neginf=-torch.inf).softmax(-1)
    shares = torch.bincount(chosen, minlength=5) / count
    deviations = (expected * (1 - expected) / count).sqrt()
    assert shares[1] == 0
    assert bool(((shares - expected).abs() <= 4 * deviations).all())


def test_own_text_in_bf16_is_that_of_a_model_whose_weights_are_read_again(monkeypatch):
    """A streamed run keeps no copies of the weights in bf16, and generates the same text."""
    model = random_model("llama")
    text = library.own_text(model, 2, 16, compute="bfloat16")
    assert not torch.equal(text, library.own_text(model, 2, 16, compute="float32"))
    mixed = self_generated.mixed_precision
    monkeypatch.setattr(
        self_generated, "mixed_precision", lambda *given, cache: mixed(*given, cache=False)
    )
    assert torch.equal(library.own_text(model, 2, 16, compute="bfloat16"), text)


def test_streamed_run_adds_own_samples(apt, command):
    result = apt(*command, "--samples", 6, "--effort", "best", "--stream", "-o", "out")
    assert result.code == 0, result.err
    calibration = json.loads(Path("out/apt_report.json").read_text())["calibration"]
    assert (calibration["own_samples"], calibration["shape"][0]) == (2, 8)


@pytest.mark.parametrize(
    ("given", "own", "length", "used"),
    [(40, 3, 8, 6), (60, 3, 17, 12), (10, 9, 8, 2), (3, 2, 8, 0), (9, 2, 5, 0)],
)
def test_each_fourth_window_of_a_training_is_generated(given, own, length, used):
    """Own samples are used twice, are cut to windows, and never replace given ones."""
    given = torch.arange(given * 8).view(given, 8)
    own = -1 - torch.arange(own * length).view(own, length)
    text = beside_given(given, own)
    generated = text[:, 0] < 0
    assert torch.equal(text[~generated], given)
    assert generated.nonzero().flatten().tolist() == [3 + 4 * n for n in range(used)]
    counts = text[generated].unique(dim=0, return_counts=True)[1]
    assert set(counts.tolist()) <= {1, 2}
