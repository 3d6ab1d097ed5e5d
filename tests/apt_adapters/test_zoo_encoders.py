"""The embedded checkpoints that are no decoders, and the embedded pairs of lines."""

import gzip
import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

ZOO = Path(str(files("apt_adapters"))) / "zoo"
DATA = Path(str(files("apt_plugins"))) / "data"


def pairs(split):
    """The embedded pairs of a split, as dictionaries."""
    text = gzip.decompress((DATA / f"pairs-{split}.jsonl.gz").read_bytes()).decode()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_checkpoints_are_small_bfloat16_and_have_a_card(name):
    tensors = load_file(ZOO / name / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    parameters = sum(tensor.numel() for tensor in tensors.values())
    assert 2_000_000 < parameters < 3_000_000
    card = (ZOO / name / "README.md").read_text(encoding="utf-8")
    assert f"{parameters:,} parameters" in card
    assert "license: cc-by-sa-4.0" in card


def test_bert_fills_a_mask_by_its_context():
    fill = pipeline("fill-mask", str(ZOO / "bert"))
    texts = ["The band was formed [MASK] 1985.", "He was born in the [MASK] of New York."]
    best = [{answer["token_str"] for answer in answers} for answers in fill(texts)]
    assert "in" in best[0]
    assert "city" in best[1]


def test_bert_tokenizer_marks_one_text_and_two():
    tokenizer = AutoTokenizer.from_pretrained(ZOO / "bert")
    encoded = tokenizer("The sun", "the moon")
    assert tokenizer.decode(encoded["input_ids"]) == "[CLS] the sun [SEP] the moon [SEP]"
    assert sorted(encoded["token_type_ids"]) == encoded["token_type_ids"]
    assert set(encoded["token_type_ids"]) == {0, 1}


def test_t5_expects_the_capitals_and_marks_that_its_source_lacks():
    tokenizer = AutoTokenizer.from_pretrained(ZOO / "t5")
    model = AutoModelForSeq2SeqLM.from_pretrained(ZOO / "t5", dtype=torch.float32).eval()
    chosen = pairs("evaluation")[::40]
    sources = tokenizer([pair["source"] for pair in chosen], padding=True, return_tensors="pt")

    def loss(targets):
        labels = tokenizer(targets, padding=True, return_tensors="pt")["input_ids"]
        labels[labels == tokenizer.pad_token_id] = -100
        with torch.no_grad():
            return float(model(**sources, labels=labels).loss)

    restored = loss([pair["target"] for pair in chosen])
    assert restored < 0.8
    assert restored < loss([pair["source"] for pair in chosen])


def test_t5_tokenizer_gives_texts_back():
    tokenizer = AutoTokenizer.from_pretrained(ZOO / "t5")
    for text in ['A "quoted" (bracketed) word, 3.5 %', "Zürich — Ω", *("a", "A")]:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_sources_are_targets_without_capitals_and_marks():
    calibration, evaluation = pairs("calibration"), pairs("evaluation")
    assert not {p["target"] for p in calibration} & {p["target"] for p in evaluation}
    for pair in calibration + evaluation:
        words = [word.strip(".,;:?!\"'()[]").lower() for word in pair["target"].split(" ")]
        assert pair["source"].split(" ") == words


def test_pairs_quote_the_embedded_text_of_their_split():
    for split in ("calibration", "evaluation"):
        text = gzip.decompress((DATA / f"{split}.txt.gz").read_bytes()).decode()
        found = " ".join(text.split())
        assert all(pair["target"] in found for pair in pairs(split))


def test_pairs_are_small():
    assert sum(path.stat().st_size for path in DATA.glob("pairs-*")) < 200_000
