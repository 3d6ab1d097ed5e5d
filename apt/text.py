"""Text in, tokens out: data sources, packing, sampling."""

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from apt.errors import AptError, first_line, unknown
from apt.plugins import Registry

Split = Literal["calibration", "evaluation"]
_CHARACTERS_PER_TOKEN = 32  # far above any tokenizer's mean, so that a cut text still has enough
_SUFFIXES = ".txt, .jsonl or .parquet"


def documents(source: str, split: Split, registry: Registry) -> Iterator[str]:
    """The documents of a data source.

    Args:
        source: a name that a plugin offers (``builtin``, ``wikitext2``), a local .txt, .jsonl or
            .parquet file, or a hub data set, ``NAME`` or ``NAME:CONFIG``.
        split: which part of it; a local file has one part for both.
        registry: the plugins.

    Raises:
        AptError: there is no such source, or it cannot be read.
    """
    if source.lower() in registry.calibrations.specs:
        return iter(registry.calibrations.get(source).load()(split))
    path = Path(source).expanduser()
    if path.is_file():
        return read_file(path)
    if path.exists() or path.suffix or source.startswith((".", "/", "~")):
        raise AptError(f"no such data set: {source} is no file", f"give {_SUFFIXES}")
    if "/" not in source:
        raise unknown("data set", source, registry.calibrations.specs)
    name, _, config = source.partition(":")
    return hub_documents(name, config or None, split)


def read_file(path: Path) -> Iterator[str]:
    """The documents of a local file: the text, or one for each line or row."""
    readers = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in readers:
        raise AptError(f"{path} has an unknown format", f"give {_SUFFIXES}")
    try:
        yield from readers[suffix](path)
    except (OSError, ValueError, EOFError) as error:
        raise AptError(f"{path} cannot be read: {first_line(error)}") from error


def _open(path: Path) -> Any:
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8")


def _read_text(path: Path) -> Iterator[str]:
    with _open(path) as file:
        yield file.read()


def _read_jsonl(path: Path) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _text_of(json.loads(line), f"line {number}")


def _read_parquet(path: Path) -> Iterator[str]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                yield _text_of(row, "its first row")


def _text_of(row: Any, where: str) -> str:
    """A row's text: a bare string, its ``text`` field, or its only string field."""
    if isinstance(row, str):
        return row
    fields = {k: v for k, v in row.items() if isinstance(v, str)} if isinstance(row, dict) else {}
    if "text" in fields:
        return fields["text"]
    if len(fields) != 1:
        raise ValueError(f"{where} has no field 'text'")
    return next(iter(fields.values()))


def hub_documents(
    name: str,
    config: str | None,
    split: Split,
    files: dict[str, str] | None = None,
    revision: str | None = None,
) -> Iterator[str]:
    """The documents of a data set that `datasets` loads, streamed.

    Args:
        name: a hub name, or a builder such as ``parquet`` with local ``files``.
        config: the data set's configuration.
        split: calibration reads ``train``; evaluation reads ``test``, else ``validation``.
        files: the files to read for each of the data set's splits.
        revision: a branch of its repository.
    """
    import datasets

    wanted = ("train",) if split == "calibration" else ("test", "validation")
    try:
        loaded = datasets.load_dataset(
            name, config, data_files=files, revision=revision, streaming=True
        )
        part = next((loaded[key] for key in wanted if key in loaded), None)
        if part is None:
            raise ValueError(f"it has no split {' or '.join(wanted)}")
        for row in part:
            yield _text_of(row, "its first row")
    except Exception as error:  # `datasets` has no base class for what it raises
        raise AptError(
            f"data set '{name}' cannot be read: {first_line(error)}",
            "check the name and the network, or give a local file",
        ) from error


def tokenize(tokenizer: Any, texts: Iterable[str], limit: int | None = None) -> Tensor:
    """One row of token ids of the documents joined by blank lines.

    Args:
        tokenizer: the model's tokenizer.
        texts: the documents.
        limit: the number of tokens that is enough; reading stops where that many are certain.
    """
    parts, size = [], 0
    for text in texts:
        parts.append(text)
        size += len(text)
        if limit is not None and size >= limit * _CHARACTERS_PER_TOKEN:
            break
    ids = tokenizer("\n\n".join(parts), verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def windows(tokens: Tensor, samples: int | None, seqlen: int, source: str) -> Tensor:
    """Cut a row of tokens into consecutive windows (windows, seqlen), at least ``samples``.

    Raises:
        AptError: there are fewer.
    """
    count = len(tokens) // seqlen
    if count < (samples or 1):
        advice = f"use --samples {count}, a smaller --seqlen" if count else "use a smaller --seqlen"
        raise AptError(
            f"too little text: {source} gives {len(tokens):,} tokens, {count} samples of {seqlen}, "
            f"and {samples or 1} are needed",
            f"{advice} or more text",
        )
    return tokens[: count * seqlen].view(count, seqlen)


def calibration_tokens(
    tokenizer: Any, texts: Iterable[str], samples: int, seqlen: int, seed: int, source: str
) -> Tensor:
    """``samples`` windows (samples, seqlen), drawn without overlap by ``seed``."""
    # Four times as many windows as are drawn, so that a seed matters on a large source.
    tokens = tokenize(tokenizer, texts, limit=4 * samples * seqlen)
    cut = windows(tokens, samples, seqlen, source)
    generator = torch.Generator().manual_seed(seed)
    return cut[torch.randperm(len(cut), generator=generator)[:samples]]


def evaluation_tokens(
    tokenizer: Any,
    texts: Iterable[str],
    samples: int | None,
    seqlen: int,
    source: str,
    *,
    fewer: bool = False,
) -> Tensor:
    """The first ``samples`` windows (samples, seqlen), or all; no more text is read than needed.

    Where the text has not as many, that is an error, unless ``fewer`` will do.
    """
    limit = samples * seqlen if samples else None
    needed = None if fewer else samples
    return windows(tokenize(tokenizer, texts, limit), needed, seqlen, source)[:samples]


def digest(tokens: Tensor) -> str:
    """SHA-256 of token ids and their shape."""
    shape = f"{tuple(tokens.shape)}\n".encode()
    return hashlib.sha256(shape + tokens.contiguous().numpy().tobytes()).hexdigest()
