"""Text files of any content: complete texts of valid files, one-line errors for others."""

import gzip
import json
from contextlib import suppress

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from apt.errors import AptError
from apt.text import files as textfiles
from apt.text.files import read_file

SUFFIXES = [".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet"]
anything = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@anything
@given(suffix=st.sampled_from(SUFFIXES), raw=st.binary(max_size=200), packed=st.booleans())
def test_reader_handles_any_bytes(tmp_path, suffix, raw, packed):
    path = tmp_path / f"any{suffix}"
    path.write_bytes(gzip.compress(raw) if packed else raw)
    with suppress(AptError):
        assert all(isinstance(text, str) for text in read_file(path))


@anything
@given(cut=st.integers(0, 400), at=st.integers(0, 400), byte=st.integers(0, 255))
@pytest.mark.parametrize("suffix", [".txt.gz", ".parquet"])
def test_reader_handles_damaged_files(tmp_path, suffix, cut, at, byte):
    path = tmp_path / f"sound{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pyarrow.table({"text": ["one", "two"] * 20}), path)
    else:
        path.write_bytes(gzip.compress(b"some words\n\nand more of them " * 20))
    raw = bytearray(path.read_bytes())
    raw[at % len(raw)] = byte
    path.write_bytes(raw[: len(raw) - cut])
    with suppress(AptError):
        list(read_file(path))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@anything
@given(values=st.lists(json_values, max_size=4))
def test_reader_handles_any_json_rows(tmp_path, values):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, values)))
    with suppress(AptError):
        assert all(isinstance(text, str) for text in read_file(path))


@anything
@given(text=st.text(alphabet="ab\n", max_size=80))
def test_joined_pieces_are_the_text(tmp_path, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textfiles, "_PIECE", 7)
        (tmp_path / "a.txt").write_text(text)
        assert "\n\n".join(read_file(tmp_path / "a.txt")) == text


def test_long_text_is_read_in_pieces(tmp_path):
    text = "\n\n".join(f"paragraph {n} " * 50 for n in range(5000))
    (tmp_path / "a.txt").write_text(text)
    pieces = list(read_file(tmp_path / "a.txt"))
    assert len(pieces) > 2
    assert "\n\n".join(pieces) == text


def _bomb(path, suffix):
    """Write a small file that unpacks to one very long text."""
    size = 2**22
    if suffix == ".parquet":
        dictionary = pyarrow.DictionaryArray.from_arrays([0] * 4, ["a" * size])
        parquet.write_table(pyarrow.table({"text": dictionary}), path, compression="zstd")
    else:
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(b'"' + b"a" * size + b'"')
    assert path.stat().st_size < size / 50


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        (".txt.gz", "a paragraph has more than 2,097,152 characters"),
        (".jsonl.gz", "line 1 has more than 2,097,152 characters"),
        (".parquet", "row 1 has more than 2,097,152 characters"),
    ],
)
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, suffix, message):
    monkeypatch.setattr(textfiles, "_LONGEST", 2**21)  # of 2**26
    path = tmp_path / f"bomb{suffix}"
    _bomb(path, suffix)
    with pytest.raises(AptError, match=message):
        list(read_file(path))


def test_truncated_deep_json_is_refused(tmp_path):
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(AptError, match="cannot be read"):
        list(read_file(tmp_path / "deep.jsonl"))


def test_unpaired_surrogate_is_refused_with_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "sound"}\n{"text": "a \\ud800 b"}\n')
    with pytest.raises(AptError, match=r"line 2 has half of a surrogate pair, '\\ud800'"):
        list(read_file(path))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_row_without_text_is_refused_with_its_number(tmp_path, suffix):
    path, texts = tmp_path / f"a{suffix}", ["word"] * 50 + [None, "word"]
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        parquet.write_table(pyarrow.table({"text": texts}), path)
    where = "line 51" if suffix == ".jsonl" else "row 51"
    with pytest.raises(AptError, match=f"{where} has null instead of a string in its field 'text'"):
        list(read_file(path))


def test_deeply_nested_json_is_refused_in_one_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(AptError, match="its JSON is nested too deeply"):
        list(read_file(path))


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".jsonl", ".jsonl.gz"])
def test_byte_order_mark_is_not_part_of_the_text(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    raw = b"\xef\xbb\xbf" + (b'{"text": "word"}' if "jsonl" in suffix else b"word")
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    assert list(read_file(path)) == ["word"]
