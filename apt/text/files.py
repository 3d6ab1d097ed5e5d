"""Documents from local files, with size limits: an untrusted file cannot exhaust the memory."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apt.errors import AptError, first_line
from apt.plugin.documents import Document, conversation_of, texts_of

SUFFIXES = ".txt, .jsonl or .parquet"
ENDINGS = (".txt", ".jsonl", ".parquet", ".gz")
"""The last suffixes of the files that can be read."""

_PIECE = 2**20  # characters
_LONGEST = 2**26  # characters of a paragraph or a line
_LARGEST = 2**30  # bytes of a row group, and of `_ROWS` rows
_ROWS = 16


def read_file(path: Path) -> Iterator[Document]:
    """The documents of a local file, which may be compressed (.gz): one per line or row.

    A .txt file is split into pieces at the ends of paragraphs. Joined by blank lines, the pieces
    are the text.

    Raises:
        AptError: the file is damaged, has another format, or exceeds the size limits.
    """
    readers = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in readers or (suffix, path.suffix) == (".parquet", ".gz"):
        raise AptError(f"{path} has an unknown format", f"give {SUFFIXES}")
    try:
        yield from readers[suffix](path)
    except RecursionError as error:
        raise AptError(f"{path} cannot be read: its JSON is nested too deeply") from error
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise AptError(f"{path} cannot be read: {first_line(error)}") from error


def _open(path: Path) -> Any:
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig")  # some tools write a byte order mark


def _read_text(path: Path) -> Iterator[str]:
    buffered = ""
    with _open(path) as file:
        while piece := file.read(_PIECE):
            complete, separator, rest = (buffered + piece).rpartition("\n\n")
            if separator and len(complete) >= _PIECE:
                yield complete
                buffered = rest
            else:
                buffered += piece
            if len(buffered) > _LONGEST:
                raise ValueError(f"a paragraph has more than {_LONGEST:,} characters")
    yield buffered


def _read_jsonl(path: Path) -> Iterator[Document]:
    with _open(path) as file:
        number = 0
        while line := file.readline(_LONGEST):
            number += 1
            if len(line) == _LONGEST:
                raise ValueError(f"line {number} has more than {_LONGEST:,} characters")
            if line.strip():
                yield document_of(json.loads(line), f"line {number}")


def _read_parquet(path: Path) -> Iterator[Document]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).total_byte_size
            if size > _LARGEST:
                raise ValueError(f"a group of its rows unpacks to {size:,} bytes")
        number = 0
        for batch in file.iter_batches(batch_size=_ROWS):
            if batch.nbytes > _LARGEST:
                raise ValueError(f"{batch.num_rows} of its rows have {batch.nbytes:,} bytes")
            for index in range(batch.num_rows):  # one by one: equal values share memory in a batch
                number += 1
                row = {name: batch.column(name)[index].as_py() for name in batch.schema.names}
                document = document_of(row, f"row {number}")
                size = len(document) if isinstance(document, str) else document.size
                if size > _LONGEST:
                    raise ValueError(f"row {number} has more than {_LONGEST:,} characters")
                yield document


def document_of(row: Any, where: str) -> Document:
    """The document of a row.

    It is the row if that is a string, its field ``text``, its conversation, two texts, or its only
    string; with its class if it has one.

    Args:
        where: the row or line number, for messages.

    Raises:
        ValueError: the row has no text, or the text has an unpaired surrogate.
    """
    named = isinstance(row, dict) and "text" in row
    conversation = None if named else conversation_of(row)
    for text in (message for _, message in conversation.messages) if conversation else ():
        _check_surrogates(text, where)
    if conversation is None and (texts := texts_of(row)) is not None:
        _check_surrogates(texts, where)
        return texts
    return conversation or text_of(row, where)


def text_of(row: Any, where: str) -> str:
    """The text of a row without a conversation; see `document_of`."""
    text = row if isinstance(row, str) else _field_of(row, where)
    _check_surrogates(text, where)
    return text


def _check_surrogates(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} has half of a surrogate pair, {text[error.start]!a}") from error


def _field_of(row: Any, where: str) -> str:
    fields = row if isinstance(row, dict) else {}
    texts = [value for value in fields.values() if isinstance(value, str)]
    if "text" in fields and not isinstance(fields["text"], str):
        kind = "null" if fields["text"] is None else type(fields["text"]).__name__
        raise ValueError(f"{where} has {kind} instead of a string in its field 'text'")
    if "text" in fields:
        return str(fields["text"])
    if len(texts) != 1:
        raise ValueError(f"{where} has no field 'text'")
    return texts[0]
