"""Mixes of kinds of text: names with shares, samples of each, conversations, embedded kinds."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import apt as library
from apt.errors import AptError
from apt.extending import Conversation
from apt.locations.text_sources import (
    TextSource,
    apportioned,
    labels,
    portable_sources,
    text_sources,
)
from apt.plugin.registry import registry
from apt.text.datasets import calibration_tokens, digest, documents, hub_documents, tokenize
from apt.text.files import read_file
from apt.text.mixes import mixed_samples
from tests.helpers import TEXT

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('no system messages') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
)
TALK = Conversation((("user", "Who are you?"), ("assistant", "A model.")))


@pytest.fixture
def chat_tokenizer():
    """The zoo's tokenizer with a chat template that refuses system messages."""
    made = AutoTokenizer.from_pretrained(registry().adapters.get("llama").zoo_path())
    made.chat_template = TEMPLATE
    return made


def draw(tokenizer, texts, samples, source, bos):
    return calibration_tokens(tokenizer, texts, samples, 16, 0, source, bos)


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("chat=0.5,code=0.3,wiki", [0.5, 0.3, 0.2]),
        ("builtin:wiki,texts.jsonl=3", [0.25, 0.75]),
        ("a/b:1.0 , c/d=2,e/f=1", [0.25, 0.5, 0.25]),
        ("a=.25,b,c", [0.25, 0.375, 0.375]),
    ],
)
def test_shares_are_relative_and_the_rest_is_divided(text, shares):
    assert [source.share for source in text_sources(text)] == pytest.approx(shares)


@pytest.mark.parametrize("text", ["builtin", "some=2.txt", "chat=0.5", "owner/name:config"])
def test_one_source_is_taken_as_it_is(text):
    assert text_sources(text) == (TextSource(text),)


def test_a_file_with_a_comma_is_one_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a,b=2.txt").write_text("words")
    assert text_sources("a,b=2.txt") == (TextSource("a,b=2.txt"),)


@pytest.mark.parametrize(
    ("text", "fault"),
    [("a,,b", "without a name"), ("a,b=0", "share of 0 for b"), ("a=1,b,a", "names a twice")],
)
def test_a_mix_that_says_nothing_is_refused(text, fault):
    with pytest.raises(AptError, match=fault):
        text_sources(text)


def test_reports_have_no_folders_of_a_mix():
    assert portable_sources(f"{TEXT}=1,builtin=3") == f"{TEXT.name}=0.25,builtin=0.75"


def test_files_of_the_same_name_have_different_labels():
    names = ["/a/x.txt", "builtin", "/b/x.txt"]
    assert list(labels(names).values()) == ["x.txt", "builtin", "x.txt (2)"]


def test_samples_are_divided_by_share_and_no_source_gets_none():
    sources = text_sources("a=0.6,b=0.39,c=0.01")
    assert apportioned(10, sources) == [6, 3, 1]
    assert apportioned(3, sources) == [1, 1, 1]
    with pytest.raises(AptError, match="2 samples are fewer than the 3 sources"):
        apportioned(2, sources)


def test_the_samples_of_each_source_are_those_that_it_gives_alone(tokenizer):
    mix = mixed_samples(f"{TEXT}=3,builtin", tokenizer, registry(), 8, None, draw)
    assert [source.samples for source in mix.sources] == [6, 2]
    assert not any(source.chat for source in mix.sources)
    for at, source in enumerate(mix.sources):
        texts = documents(source.name, "calibration", registry())
        alone = draw(tokenizer, texts, source.samples, source.name, None)
        assert torch.equal(mix.tokens[mix.owners == at], alone)


def test_any_first_samples_of_a_mix_are_of_all_sources(tokenizer):
    mix = mixed_samples(f"{TEXT}=3,builtin", tokenizer, registry(), 8, None, draw)
    assert set(mix.owners[:2].tolist()) == {0, 1}
    assert mix.owners[:4].sum() == 1
    assert mix.owners.tolist().count(1) == 2


def test_a_mix_is_drawn_by_its_seed_and_one_source_as_before(tokenizer):
    given = {"samples": 6, "seqlen": 16}
    mixed = [
        digest(library.calibration_tokens(tokenizer, f"{TEXT},builtin", seed=seed, **given))
        for seed in (0, 0, 1)
    ]
    assert mixed[0] == mixed[1] != mixed[2]
    alone = library.calibration_tokens(tokenizer, str(TEXT), **given)
    assert torch.equal(alone, calibration_tokens(tokenizer, read_file(TEXT), 6, 16, 0, "x"))


def test_conversations_are_rendered_by_the_template_of_the_tokenizer(chat_tokenizer, tokenizer):
    text = "<|user|>Who are you?<|end|><|assistant|>A model.<|end|>"
    assert TALK.rendered(chat_tokenizer) == text
    assert chat_tokenizer.decode(tokenize(chat_tokenizer, [TALK, TALK])) == 2 * text
    plain = "User: Who are you?\n\nAssistant: A model."
    assert tokenizer.decode(tokenize(tokenizer, [TALK, TALK])) == f"{plain}\n\n{plain}"


def test_a_system_message_goes_into_the_first_question_if_the_template_refuses_it(chat_tokenizer):
    briefed = Conversation((("system", "Be brief."), *TALK.messages))
    assert "<|user|>Be brief.\n\nWho are you?<|end|>" in briefed.rendered(chat_tokenizer)


def test_a_template_that_fails_is_one_line(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(AptError, match="refuses a conversation: roles must alternate"):
        TALK.rendered(chat_tokenizer)


ROWS = {
    "ultrachat": {
        "prompt": "x", "prompt_id": "7",
        "messages": [
            {"role": "user", "content": "Who are you?"},
            {"role": "assistant", "content": "A model."},
        ],
    },
    "sharegpt": {
        "id": "7",
        "conversations": [
            {"from": "human", "value": "Who are you?"}, {"from": "gpt", "value": "A model."}
        ],
    },
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Who are you?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A model."}]},
        ],
    },
    "codealpaca": {"instruction": "Who are you?", "output": "A model."},
    "alpaca": {"instruction": "Who are you?", "input": "", "output": "A model."},
    "gsm8k": {"question": "Who are you?", "answer": "A model."},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
def test_rows_of_the_usual_formats_are_conversations(kind, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS[kind]) + "\n")
    assert list(read_file(path)) == [TALK]


def test_a_row_with_a_text_is_that_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "plain", **ROWS["ultrachat"]}) + "\n")
    assert list(read_file(path)) == ["plain"]


HUB = {
    "chat": ("HuggingFaceH4/ultrachat_200k", None, ("train_sft", "test_sft"), "ultrachat"),
    "code": ("theblackcat102/evol-codealpaca-v1", None, ("train", None), "codealpaca"),
    "math": ("openai/gsm8k", "main", ("train", "test"), "gsm8k"),
    "wiki": ("Salesforce/wikitext", "wikitext-103-raw-v1", ("train", "test"), None),
}


@pytest.mark.parametrize("kind", HUB)
def test_kinds_on_the_hub_are_read_by_their_own_splits(kind, tmp_path, monkeypatch):
    """The loader of `datasets` on local files of the same format, with the splits of the hub."""
    import datasets

    name, config, parts, row = HUB[kind]
    row, files, asked = ROWS[row] if row else {"text": "plain"}, {}, []
    for part in filter(None, parts):
        files[part] = str(tmp_path / f"{part}.jsonl")
        Path(files[part]).write_text(json.dumps(row) + "\n")
    plain = datasets.load_dataset

    def load(name, config=None, **given):
        asked.append((name, config))
        return plain("json", data_files=files, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("apt.text.datasets.reachable", lambda: True)
    for split, part in zip(("calibration", "evaluation"), parts, strict=True):
        texts = documents(kind, split, registry())
        if part is None:
            with pytest.raises(AptError, match="it has no split test or validation"):
                list(texts)
        else:
            assert list(texts) == ["plain" if kind == "wiki" else TALK]
    assert set(asked) == {(name, config)}


def test_a_data_set_without_its_named_split_is_an_error(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "x"}) + "\n")
    parts = {"calibration": "train_sft"}
    with pytest.raises(AptError, match="it has no split train_sft"):
        list(hub_documents("json", None, "calibration", {"train": str(path)}, parts=parts))


@pytest.mark.parametrize(
    ("kind", "chat", "characters"),
    [("chat", True, 2e6), ("code", False, 2.5e5), ("math", True, 6e5)],
)
def test_each_embedded_kind_has_two_parts_without_a_document_in_common(kind, chat, characters):
    parts = [
        list(documents(f"builtin:{kind}", split, registry()))
        for split in ("calibration", "evaluation")
    ]
    assert all(isinstance(each, Conversation) == chat for part in parts for each in part)
    assert not set(parts[0]) & set(parts[1])
    assert sum(each.size if chat else len(each) for each in parts[0]) > characters


def test_solutions_of_the_embedded_problems_are_right():
    """The results of some kinds of problems, computed anew from their texts."""
    import re

    checked = 0
    for talk in islice(documents("builtin:math", "evaluation", registry()), 200):
        (_, asked), (_, answer) = talk.messages
        if found := re.fullmatch(r"Solve for x: \$(\d+)x \+ (\d+) = (-?\d+)\$\.", asked):
            a, b, c = map(int, found.groups())
            x = int(re.search(r"Therefore \$x = (-?\d+)\$", answer)[1])
            assert a * x + b == c
        elif found := re.fullmatch(r"Find the remainder of (\d+)\^(\d+) divided by (\d+)\.", asked):
            base, power, modulus = map(int, found.groups())
            assert answer.endswith(f"The remainder is {pow(base, power, modulus)}.")
        else:
            continue
        checked += 1
    assert checked > 10
