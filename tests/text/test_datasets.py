"""Data sets, tokenization, and windows of tokens."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import torch

import apt as library
from apt.errors import AptError
from apt.plugin.registry import registry
from apt.text.datasets import (
    calibration_tokens,
    digest,
    documents,
    evaluation_tokens,
    held_back_tokens,
    hub_documents,
    tokenize,
    windows,
)
from apt.text.files import read_file
from tests.helpers.families import builtin

TEXTS = ["The first text.", "The second,\nof two lines.", "The third: naïve café."]


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("extra", [{}, {"url": "x"}], ids=["text", "text-and-more"])
def test_each_row_is_a_document(tmp_path, name, extra):
    path = write(tmp_path / name, [{"text": text, **extra} for text in TEXTS])
    assert list(documents(str(path), "calibration", registry())) == TEXTS


def test_only_string_column_is_the_text(tmp_path):
    path = write(tmp_path / "a.parquet", [{"sentence": text, "n": 1} for text in TEXTS])
    assert list(read_file(path)) == TEXTS


def test_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[1], encoding="utf-8")
    assert list(read_file(tmp_path / "a.txt")) == [TEXTS[1]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a,b", "unknown format"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read"),
        ("a.jsonl", b'{"text": "x"}\n{"tex', "cannot be read"),
        ("a.jsonl", b'{"a": "x", "b": "y"}\n', "line 1 has no field 'text'"),
        ("a.jsonl", b"[1, 2]\n", "line 1 has no field 'text'"),
        ("a.parquet", b"PAR1 and then nothing", "cannot be read"),
        ("a.txt.gz", b"no gzip", "cannot be read"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AptError, match=message) as caught:
        list(documents(str(tmp_path / name), "calibration", registry()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("biultin", "did you mean 'builtin'"),
        ("nowhere.txt", "no such data set: nowhere.txt is no file"),
        ("folder/nowhere.txt", "is no file"),
        ("./nowhere", "is no file"),
        (".", r"\. is a folder, and texts are read from one file"),
    ],
)
def test_unknown_sources_are_refused_by_name(source, message):
    with pytest.raises(AptError, match=message):
        documents(source, "calibration", registry())


@pytest.mark.parametrize("name", ["abisee/cnn_dailymail:3.0.0", "someone/text-v1.5"])
def test_names_of_hub_data_sets_may_have_dots(name, monkeypatch):
    def result(name, config, split):
        return iter([f"{name} {config}"])

    monkeypatch.setattr("apt.text.datasets.hub_documents", result)
    repository, _, config = name.partition(":")
    expected = [f"{repository} {config or None}"]
    assert list(documents(name, "calibration", registry())) == expected


def test_hub_documents_reads_the_split_for_each_use(tmp_path):
    """Local files in the same formats replace the data sets of the hub."""
    for kind, name in (("parquet", "x.parquet"), ("json", "x.json.gz")):
        files = {}
        for split in ("train", "validation"):
            (tmp_path / split).mkdir(exist_ok=True)
            rows = [{"text": f"{split} {text}", "url": "x"} for text in TEXTS]
            files[split] = str(write(tmp_path / split / name, rows))
        for split, part in (("calibration", "train"), ("evaluation", "validation")):
            result = list(hub_documents(kind, None, split, files=files))
            assert result == [f"{part} {text}" for text in TEXTS]


def test_data_set_without_the_split_is_refused(tmp_path):
    path = write(tmp_path / "x.parquet", [{"text": "x"}])
    with pytest.raises(AptError, match="no split test or validation"):
        list(hub_documents("parquet", None, "evaluation", files={"train": str(path)}))


def test_builtin_splits_share_no_article():
    calibration, evaluation = (
        set("\n\n".join(documents("builtin", split, registry())).split("\n\n"))
        for split in ("calibration", "evaluation")
    )
    assert len(calibration) > 1000
    assert len(evaluation) > 200
    assert not calibration & evaluation


def test_documents_are_joined_by_blank_lines(tokenizer):
    ids = tokenize(tokenizer, TEXTS)
    assert tokenizer.decode(ids) == "\n\n".join(TEXTS)


def test_tokenize_stops_reading_at_the_limit(tokenizer):
    def endless():
        while True:
            yield TEXTS[0]

    assert len(tokenize(tokenizer, endless(), limit=500)) >= 500


def test_windows_are_consecutive_and_complete():
    cut = windows(torch.arange(25), 2, 10, "x")
    assert cut.tolist() == [list(range(10)), list(range(10, 20))]


@pytest.mark.parametrize(("tokens", "message"), [(25, "use 2 samples"), (5, "smaller seqlen")])
def test_error_of_too_little_text_gives_its_length(tokens, message):
    with pytest.raises(AptError, match=f"too little text: x gives {tokens} tokens.*{message}"):
        windows(torch.arange(tokens), 3, 10, "x")


def test_calibration_samples_depend_on_the_seed_and_do_not_overlap(tokenizer):
    texts = [builtin("calibration")]
    drawn = [calibration_tokens(tokenizer, texts, 8, 32, seed, "builtin") for seed in (0, 0, 1)]
    assert drawn[0].shape == (8, 32)
    assert digest(drawn[0]) == digest(drawn[1]) != digest(drawn[2])
    assert len({tuple(row) for row in drawn[0].tolist()}) == 8


def test_held_back_windows_are_not_among_the_samples(tokenizer):
    arguments = (tokenizer, [builtin("calibration")], 16, 32, 0, "builtin")
    drawn = calibration_tokens(*arguments).tolist()
    for share, count in ((1 / 8, 2), (0.01, 1), (1.0, 16), (3.0, 48)):
        held = held_back_tokens(*arguments, share=share).tolist()
        assert len(held) == count
        assert not {tuple(row) for row in drawn} & {tuple(row) for row in held}
    tokens = tokenize(tokenizer, TEXTS)
    held = held_back_tokens(tokenizer, TEXTS, 1, len(tokens), 0, "x", share=1.0)
    assert held.shape == (0, len(tokens))


@pytest.mark.parametrize("read", [library.calibration_tokens, library.evaluation_tokens])
@pytest.mark.parametrize("amount", [{"samples": -3}, {"samples": 0}, {"samples": 2, "seqlen": 0}])
def test_amounts_without_text_are_refused(read, amount, tokenizer):
    with pytest.raises(AptError, match="samples must be at least 1 and seqlen at least 2"):
        read(tokenizer, **amount)


def test_fewer_windows_are_an_error_unless_allowed(tokenizer):
    texts = TEXTS * 20
    assert 0 < len(evaluation_tokens(tokenizer, texts, 1000, 16, "x", fewer=True)) < 1000
    with pytest.raises(AptError, match="too little text"):
        evaluation_tokens(tokenizer, texts, 1000, 16, "x")


def test_evaluation_tokens_stops_reading_at_the_needed_text(tokenizer):
    def endless():
        while True:
            yield TEXTS[0]

    assert evaluation_tokens(tokenizer, endless(), 3, 16, "x", fewer=True).shape == (3, 16)


def test_evaluation_tokens_are_the_first_windows(tokenizer):
    texts = [builtin("evaluation")]
    ids = tokenize(tokenizer, texts)
    assert torch.equal(evaluation_tokens(tokenizer, texts, 2, 16, "x").flatten(), ids[:32])
    assert len(evaluation_tokens(tokenizer, texts, None, 16, "x")) == len(ids) // 16
