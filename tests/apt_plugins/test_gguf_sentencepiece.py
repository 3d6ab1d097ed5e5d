"""Tokenizers of SentencePiece in GGUF files: scores and merges give the same pieces."""

import json
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace, Split, Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")

from apt_plugins.gguf_files.sentencepiece import BYTES, SPACE, pieces_of  # noqa: E402

from tests.helpers import TEXT  # noqa: E402
from tests.helpers.gguf_files import checkpoint_of  # noqa: E402

LEGACY = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
RUNS = 8  # the longest run of spaces that is a token


@cache
def token_scores():
    """The scores of tokens: bytes, words, characters, and runs of spaces with one score."""
    words = Tokenizer(BPE())
    words.pre_tokenizer = Metaspace()
    words.train_from_iterator([TEXT.read_text()], BpeTrainer(vocab_size=600, show_progress=False))
    tokens = sorted(words.get_vocab(), key=words.get_vocab().get)
    scores = dict.fromkeys([*SPECIAL.values(), *sorted(BYTES)], 0.0)
    scores |= {SPACE * length: -1e9 for length in range(2, RUNS + 1)}
    scores |= {token: -1.0 - at for at, token in enumerate(tokens) if len(token) > 1}
    scores |= {token: -1e9 for token in tokens if len(token) == 1}
    return scores


def tokenizer_of(normalizer=LEGACY, steps=None):
    """A tokenizer, converted from SentencePiece as transformers converts it."""
    vocabulary = {token: number for number, token in enumerate(token_scores())}
    merges = generate_merges(vocabulary, token_scores())
    model = BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if steps is not None:
        tokenizer.pre_tokenizer = steps
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


default_tokenizer = cache(tokenizer_of)


def record_of(tokenizer):
    return json.loads(tokenizer.backend_tokenizer.to_str())


def joined(text, pieces, vocabulary):
    """The pieces of a text, joined by llama.cpp's rule: highest score first, then leftmost."""
    parts = list(text)
    while True:
        pairs = [
            (pieces.score(one + other), -at)
            for at, (one, other) in enumerate(pairwise(parts))
            if one + other in vocabulary
        ]
        if not pairs:
            return parts
        at = -max(pairs)[1]
        parts[at : at + 2] = ["".join(parts[at : at + 2])]


PARTS = st.sampled_from([*"aeinorst.,", *(" " * length for length in (1, 2, 5, 13)), "the", "and"])


@given(st.lists(PARTS, min_size=1, max_size=30))
def test_scores_and_merges_make_the_same_tokens(parts):
    tokenizer, text = default_tokenizer(), "".join(parts)
    pieces = pieces_of(record_of(tokenizer), tokenizer.get_added_vocab())
    marked = SPACE + text.replace(" ", SPACE)
    assert joined(marked, pieces, tokenizer.get_vocab()) == tokenizer.tokenize(text)


def test_exported_tokenizer_has_kinds_and_scores(apt, tmp_path):
    tokenizer = tokenizer_of()
    tokenizer.add_tokens(["two words"])
    checkpoint_of(tokenizer, vocab_size=len(tokenizer) + 1)
    run = apt("export", "model", "-o", "out.gguf")
    assert run.code == 0, run.err
    fields = gguf.GGUFReader("out.gguf").fields
    entry = {key.removeprefix("tokenizer.ggml."): fields[key].contents() for key in fields}
    assert entry["model"] == "llama"
    assert entry["add_space_prefix"] is entry["add_bos_token"] is True
    kinds = dict(zip(entry["tokens"], entry["token_type"], strict=True))
    kind = gguf.TokenType
    expected = {"<unk>": kind.UNKNOWN, "<s>": kind.CONTROL, "<0x0A>": kind.BYTE, "e": kind.NORMAL,
                "two words": kind.USER_DEFINED, f"[PAD{len(tokenizer)}]": kind.UNUSED}  # fmt: skip
    assert {token: kinds[token] for token in expected} == expected
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="out.gguf")
    text = TEXT.read_text()[:2000] + " €"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


MARKS = {"replacement": SPACE, "split": False}


@pytest.mark.parametrize(
    ("normalizer", "steps", "prefix"),
    [
        (LEGACY, None, True),
        (None, Metaspace(prepend_scheme="first", **MARKS), True),
        (None, Metaspace(prepend_scheme="never", **MARKS), False),
        (normalizers.Replace(" ", SPACE), None, False),
        (normalizers.Replace(" ", SPACE), Split(" ", "merged_with_previous"), False),
        (None, Metaspace(), None),
        (normalizers.NFKC(), Metaspace(**MARKS), None),
        (LEGACY, Whitespace(), None),
        (None, None, None),
    ],
)
def test_prefix_space_follows_from_the_normalizer_and_steps(normalizer, steps, prefix):
    pieces = pieces_of(record_of(tokenizer_of(normalizer, steps)), SPECIAL.values())
    assert (pieces and pieces.prefix) == prefix


def second_merge(merges):
    """The index of the second merge of a word."""
    tokens = ["".join(pair) for pair in merges]
    return next(
        at for at, token in enumerate(tokens) if at and token == tokens[at - 1] != SPACE * 2
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model["merges"].pop(5),
        lambda model: model["merges"].reverse(),
        lambda model: model["merges"].insert(0, model["merges"].pop(second_merge(model["merges"]))),
        lambda model: model["vocab"].pop("<0x41>"),
        lambda model: model["vocab"].update(q_=len(model["vocab"])),
        lambda model: model.update(byte_fallback=False),
        lambda model: model.update(ignore_merges=True),
        lambda model: model.update(type="Unigram"),
    ],
)
def test_pieces_of_returns_none_where_llama_cpp_would_differ(change):
    record = record_of(default_tokenizer())
    assert pieces_of(record, SPECIAL.values())
    change(record["model"])
    assert pieces_of(record, SPECIAL.values()) is None
