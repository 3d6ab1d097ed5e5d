"""Samples and windows begin with the BOS token if the tokenizer adds one."""

import copy
import json
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import apt as library
from apt.checkpoints.load import load, open_skeleton
from apt.evaluation.metrics import perplexity
from apt.locations.model_source import find
from apt.plugin.registry import registry
from apt.text.augmentation import RandomTokens
from apt.text.datasets import calibration_tokens, evaluation_tokens, tokenize, windows
from apt.text.sampling import drawn
from apt.text.special_tokens import bos_of, named_ids
from tests.helpers import TEXT
from tests.helpers.families import random_model, random_tokens

BOS, SEQLEN = 0, 32
COMMAND = ("--calibration", TEXT, "--eval", TEXT, "--samples", 4, "--seqlen", SEQLEN)


@pytest.fixture
def beginning(tokenizer):
    """A function from a template of texts to the zoo's tokenizer with this template."""

    def make(around="</s> $A"):
        made = copy.deepcopy(tokenizer)
        tokens = [("</s>", 0), ("<pad>", 1)]
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=around, pair=f"{around} $B", special_tokens=tokens
        )
        return made

    return make


@pytest.fixture
def with_bos(checkpoint, beginning, tmp_path):
    """A checkpoint whose tokenizer begins every text with the BOS token."""
    model = load(open_skeleton(find(str(checkpoint("llama")), registry()), registry())).module
    model.save_pretrained(tmp_path / "llama")
    beginning().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_bos_of_is_the_token_that_the_tokenizer_adds(tokenizer, beginning):
    assert tokenizer.bos_token_id == BOS
    assert bos_of(tokenizer) is None  # as is SmolLM2's: it has one, and does not use it
    assert bos_of(beginning()) == BOS
    assert bos_of(beginning("<pad> $A")) is None
    assert bos_of(beginning("$A </s>")) is None


@pytest.mark.parametrize("around", ["</s> $A", "</s> $A <pad>"])
def test_windows_are_the_bos_token_and_consecutive_text(around, tokenizer, beginning):
    texts, reader = [TEXT.read_text()], beginning(around)
    text = tokenize(tokenizer, texts)
    assert torch.equal(tokenize(reader, texts), text)
    result = evaluation_tokens(reader, texts, 5, SEQLEN, "x", bos_of(reader))
    assert result.shape == (5, SEQLEN)
    assert (result[:, 0] == BOS).all()
    assert torch.equal(result[:, 1:].flatten(), text[: 5 * (SEQLEN - 1)])
    everything = evaluation_tokens(reader, texts, None, SEQLEN, "x", BOS)
    assert len(everything) == len(text) // (SEQLEN - 1)
    sampled = calibration_tokens(reader, texts, 4, SEQLEN, 0, "x", BOS)
    rows = [row.tolist() for row in everything]
    assert len({tuple(row) for row in sampled.tolist()} & set(map(tuple, rows))) == 4


def test_tokenize_removes_a_bos_token_that_is_always_added(tokenizer):
    class Stubborn:
        bos_token_id = BOS

        def __call__(self, text, **options):
            return {"input_ids": [BOS, *tokenizer(text)["input_ids"]]}

    assert torch.equal(tokenize(Stubborn(), ["some text"]), tokenize(tokenizer, ["some text"]))


def test_perplexity_with_bos_counts_the_text_tokens_alone(tokenizer, beginning):
    """The reference is the cross-entropy of the same text after the BOS token."""
    model = random_model("llama")
    reader, texts = beginning(), [TEXT.read_text()]
    result = evaluation_tokens(reader, texts, 3, SEQLEN, "x", BOS)
    targets = tokenize(tokenizer, texts)[: 3 * (SEQLEN - 1)].view(3, SEQLEN - 1)
    with torch.no_grad():
        logits = model(torch.cat([torch.full((3, 1), BOS), targets], 1)).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert perplexity(model, result) == pytest.approx(float(loss.exp()), rel=1e-5)


def noting(seen):
    """A substitute of `digest` that records its tokens."""
    return lambda tokens: seen.append(tokens) or "0" * 64


def test_windows_with_bos_need_less_text():
    assert windows(torch.arange(18), 2, 10, "x", BOS).shape == (2, 10)
    with pytest.raises(library.AptError, match="use 1 samples"):
        windows(torch.arange(17), 2, 10, "x", BOS)


@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=str)
@pytest.mark.parametrize(("given", "bos"), [((), BOS), (("--no-bos",), None)], ids=str)
def test_run_begins_samples_and_windows_with_the_bos_token(
    stream, given, bos, with_bos, beginning, apt, monkeypatch
):
    seen = []
    monkeypatch.setattr("apt.engine.reports.digest", lambda tokens: seen.append(tokens) or "0" * 64)
    result = apt("prune", with_bos, *COMMAND, *stream, *given, "-o", "out")
    assert result.code == 0, result.err
    report = json.loads(Path("out/apt_report.json").read_text())
    assert report["calibration"]["bos"] == bos
    assert report["options"]["bos"] == (bos is not None)
    reader, texts = beginning(), [TEXT.read_text()]
    assert torch.equal(seen[0], calibration_tokens(reader, texts, 4, SEQLEN, 0, "x", bos))
    held_out = evaluation_tokens(reader, texts, 4, SEQLEN, "x", bos)
    pruned = load(open_skeleton(find("out", registry()), registry())).module
    measured = report["scores"]["after"]["perplexity"]
    assert measured == pytest.approx(perplexity(pruned, held_out), rel=1e-4)
    evaluated = apt("eval", "out", "--data", TEXT, *COMMAND[4:], *stream, *given, "--json")
    told = json.loads(evaluated.out)
    assert told["bos"] == bos
    assert told["perplexity"] == pytest.approx(measured, rel=1e-4)


def test_eval_takes_the_bos_token_of_the_given_tokenizer(checkpoint, with_bos, apt):
    arguments = ("--data", TEXT, "--samples", 2, "--seqlen", SEQLEN)
    plain = apt("eval", checkpoint("llama"), *arguments)
    other = apt("eval", checkpoint("llama"), *arguments, "--tokenizer", with_bos)
    assert plain.out.endswith("2 × 32 tokens\n")
    assert other.out.endswith("2 × 32 tokens, each with </s> first\n")


def test_library_with_a_tokenizer_gives_the_weights_of_the_command(with_bos, beginning, apt):
    result = apt("prune", with_bos, "--pattern", "2:4", *COMMAND, "--norm-epochs", 0, "-o", "out")
    assert result.code == 0, result.err
    model = load(open_skeleton(find(str(with_bos), registry()), registry())).module
    tokens = calibration_tokens(beginning(), [TEXT.read_text()], 4, SEQLEN, 0, "x", BOS)
    library.prune(model, tokens, pattern="2:4", tokenizer=beginning())
    pruned = load(open_skeleton(find("out", registry()), registry())).module.state_dict()
    assert all(torch.equal(pruned[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("seqlen", [12, 40])
def test_own_text_begins_with_the_bos_token(seqlen, monkeypatch):
    monkeypatch.setattr("apt.text.self_generated._PIECE", 16)
    model = random_model("llama")
    special = range(1000)
    own = library.own_text(model, 3, seqlen, bos=BOS, special=special)
    assert own.shape == (3, seqlen)
    assert (own[:, 0] == BOS).all()
    starts = own[:, 1:].flatten()[:: min(16, seqlen - 1)]
    assert (starts >= 1000).all()


def test_own_samples_of_a_run_begin_with_the_bos_token(with_bos, apt, monkeypatch):
    seen = []
    monkeypatch.setattr("apt.engine.reports.digest", lambda tokens: seen.append(tokens) or "0" * 64)
    options = ("--own-samples", 2, "--method", "wanda", "-o", "out")
    assert apt("prune", with_bos, *COMMAND, *options).code == 0
    assert seen[-1].shape == (6, SEQLEN)
    assert (seen[-1][:, 0] == BOS).all()


def test_drawn_tokens_are_never_special():
    draws = [torch.Generator().manual_seed(7) for _ in range(2)]
    special = tuple(range(0, 50, 2))
    plain, spared = (
        drawn(50, (4, 40), draw, these) for draw, these in zip(draws, ((), special), strict=True)
    )
    assert (spared % 2 == 1).all()
    assert torch.equal(plain[plain % 2 == 1], spared[plain % 2 == 1])
    assert torch.equal(*(torch.rand(3, generator=draw) for draw in draws))
    assert drawn(2, (3,), draws[0], (0, 1)).shape == (3,)


def test_copies_keep_the_bos_token_and_get_no_special_token():
    tokens = random_tokens(8, 64).clamp_min(3)
    tokens[:, 0] = BOS
    both = RandomTokens(share=1.0).beside(tokens, 64, (0, 1, 2))
    assert len(both) == 10
    assert (both[:, 0] == BOS).all()
    assert int(both[:, 1:].min()) >= 3


def spy(seen):
    """A substitute of `drawn` that records the special tokens."""

    def watched(vocabulary, shape, draw, special=()):
        seen.append(tuple(special))
        return drawn(vocabulary, shape, draw, special)

    return watched


def test_library_runs_draw_no_token_of_the_configurations(monkeypatch):
    model = random_model("llama")
    model.generation_config.eos_token_id = [0, 7]
    assert named_ids(model) == (0, 7)
    seen = []
    monkeypatch.setattr("apt.text.augmentation.drawn", spy(seen))
    options = library.PruneOptions(own_samples=0)
    library.prune(model, random_tokens(), pattern="2:4", options=options)
    assert seen == [(0, 7)]
