"""Documents out of local files, which may be anybody's: no file makes a run take up all memory."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apt.errors import AptError, first_line

SUFFIXES = ".txt, .jsonl or .parquet"
_PIECE = 2**20  # characters
_LONGEST = 2**26  # characters of a paragraph or a line
_LARGEST = 2**30  # bytes of some rows
_ROWS = 16


def read_file(path: Path) -> Iterator[str]:
    """The documents of a local file, which may end in .gz: one for each line or row.

    A text comes in pieces that end with a paragraph; joined by blank lines, they are the text.

    Raises:
        AptError: the file is damaged, in another format, or holds something far larger than text.
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
    return opener(path, "rt", encoding="utf-8")


def _read_text(path: Path) -> Iterator[str]:
    waiting = ""
    with _open(path) as file:
        while piece := file.read(_PIECE):
            whole, blank, rest = (waiting + piece).rpartition("\n\n")
            if blank and len(whole) >= _PIECE:
                yield whole
                waiting = rest
            else:
                waiting += piece
            if len(waiting) > _LONGEST:
                raise ValueError(f"a paragraph has more than {_LONGEST:,} characters")
    yield waiting


def _read_jsonl(path: Path) -> Iterator[str]:
    with _open(path) as file:
        number = 0
        while line := file.readline(_LONGEST):
            number += 1
            if len(line) == _LONGEST:
                raise ValueError(f"line {number} has more than {_LONGEST:,} characters")
            if line.strip():
                yield text_of(json.loads(line), f"line {number}")


def _read_parquet(path: Path) -> Iterator[str]:
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
            for index in range(batch.num_rows):  # one at a time: equal ones are kept once
                number += 1
                row = {name: batch.column(name)[index].as_py() for name in batch.schema.names}
                text = text_of(row, f"row {number}")
                if len(text) > _LONGEST:
                    raise ValueError(f"row {number} has more than {_LONGEST:,} characters")
                yield text


def text_of(row: Any, where: str) -> str:
    """A row's text: a bare string, its ``text`` field, or its only string field.

    Args:
        row: what was read.
        where: which row or line it is, for messages.

    Raises:
        ValueError: there is no text in it, or half a character.
    """
    text = row if isinstance(row, str) else _field_of(row, where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} has half of a surrogate pair, {text[error.start]!a}") from error
    return text


def _field_of(row: Any, where: str) -> str:
    fields = row if isinstance(row, dict) else {}
    texts = [value for value in fields.values() if isinstance(value, str)]
    if "text" in fields and not isinstance(fields["text"], str):
        found = "null" if fields["text"] is None else type(fields["text"]).__name__
        raise ValueError(f"{where} has {found} for a text in its field 'text'")
    if "text" in fields:
        return str(fields["text"])
    if len(texts) != 1:
        raise ValueError(f"{where} has no field 'text'")
    return texts[0]
