"""Text in, tokens out: data sources, packing, sampling."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from apt.errors import AptError, first_line, shortened, unknown
from apt.locations.hub import no_answer, offline, reachable
from apt.locations.paths import kind_at
from apt.plugin.registry import Registry
from apt.text.files import SUFFIXES, read_file, text_of
from apt.text.sampling import generator
from apt.text.special_tokens import bos_of

Split = Literal["calibration", "evaluation"]
_CHARACTERS_PER_TOKEN = 32  # far above any tokenizer's mean, so that a cut text still has enough


def documents(
    source: str, split: Split, registry: Registry, token: str | None = None
) -> Iterator[str]:
    """The documents of a data source.

    Args:
        source: a name that a plugin offers (``builtin``, ``wikitext2``), a local .txt, .jsonl or
            .parquet file, or a hub data set, ``NAME`` or ``NAME:CONFIG``.
        split: which part of it; a local file has one part for both.
        registry: the plugins.
        token: for a data set of the hub that is not given to everybody.

    Raises:
        AptError: there is no such source, or it cannot be read.
    """
    if source.lower() in registry.calibrations.specs:
        return iter(registry.calibrations.get(source).load()(split))
    path = Path(source).expanduser()
    kind = kind_at(path) if source else None
    if kind == "file":
        return read_file(path)
    if kind or path.suffix or source.startswith((".", "/", "~")):
        raise AptError(f"no such data set: {shortened(source)} is no file", f"give {SUFFIXES}")
    if "/" not in source:
        raise unknown("data set", source, registry.calibrations.specs)
    name, _, config = source.partition(":")
    return hub_documents(name, config or None, split, token=token)


def hub_documents(
    name: str,
    config: str | None,
    split: Split,
    files: dict[str, str] | None = None,
    revision: str | None = None,
    token: str | None = None,
    called: str | None = None,
) -> Iterator[str]:
    """The documents of a data set that `datasets` loads, streamed.

    Args:
        name: a hub name, or a builder such as ``parquet`` with local ``files``.
        config: the data set's configuration.
        split: calibration reads ``train``; evaluation reads ``test``, else ``validation``.
        files: the files to read for each of the data set's splits.
        revision: a branch of its repository.
        token: what proves who asks.
        called: what the user calls it, where that is not ``name``.

    Raises:
        AptError: the hub does not answer, or it cannot be read.
    """
    called = called or name
    remote = "/" in name or any("://" in path for path in (files or {}).values())
    if remote and not offline() and not reachable():
        raise AptError(
            f"data set '{called}' is on the hub, and {no_answer()}",
            "check the network, or give a local file",
        )
    import datasets

    wanted = ("train",) if split == "calibration" else ("test", "validation")
    try:
        loaded = datasets.load_dataset(
            name, config, data_files=files, revision=revision, token=token, streaming=True
        )
        part = next((loaded[key] for key in wanted if key in loaded), None)
        if part is None:
            raise ValueError(f"it has no split {' or '.join(wanted)}")
        for number, row in enumerate(part, 1):
            yield text_of(row, f"row {number}")
    except Exception as error:  # `datasets` has no base class for what it raises
        raise AptError(
            f"data set '{called}' cannot be read: {first_line(error)}",
            "check the name and the network, or give a local file",
        ) from error


def tokenize(tokenizer: Any, texts: Iterable[str], limit: int | None = None) -> Tensor:
    """One row of token ids of the documents joined by blank lines; no token is added.

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
    ids = tokenizer("\n\n".join(parts), add_special_tokens=False, verbose=False)["input_ids"]
    if ids[:1] == [bos_of(tokenizer)]:  # some add it all the same
        ids = ids[1:]
    return torch.tensor(ids, dtype=torch.long)


def windows(
    tokens: Tensor, samples: int | None, seqlen: int, source: str, bos: int | None = None
) -> Tensor:
    """Cut a row of tokens into consecutive windows (windows, seqlen), at least ``samples``.

    Args:
        tokens: the text.
        samples: how many are needed; None for one.
        seqlen: the tokens of each.
        source: where the text comes from.
        bos: what each begins with, before ``seqlen - 1`` tokens of text; None for text alone.

    Raises:
        AptError: there are fewer.
    """
    width = text_width(seqlen, bos)
    count = len(tokens) // width
    if count < (samples or 1):
        advice = f"use {count} samples, a smaller seqlen" if count else "use a smaller seqlen"
        raise AptError(
            f"too little text: {source} gives {len(tokens):,} tokens, {count} samples of {seqlen}, "
            f"and {samples or 1} are needed",
            f"{advice} or more text",
            ("samples", "seqlen") if count else ("seqlen",),
        )
    return begun(tokens[: count * width].view(count, width), bos)


def text_width(seqlen: int, bos: int | None) -> int:
    """How many of the tokens of a window are text."""
    return seqlen if bos is None else seqlen - 1


def begun(texts: Tensor, bos: int | None) -> Tensor:
    """``texts`` (samples, width) with ``bos`` before each (samples, width + 1), if it is one."""
    if bos is None:
        return texts
    return torch.cat([texts.new_full((len(texts), 1), bos), texts], dim=1)


def calibration_tokens(
    tokenizer: Any,
    texts: Iterable[str],
    samples: int,
    seqlen: int,
    seed: int,
    source: str,
    bos: int | None = None,
) -> Tensor:
    """``samples`` windows (samples, seqlen), drawn without overlap by ``seed``; see `windows`."""
    if not samples:
        return torch.empty(0, seqlen, dtype=torch.long)
    # Four times as many windows as are drawn, so that a seed matters on a large source.
    tokens = tokenize(tokenizer, texts, limit=4 * samples * text_width(seqlen, bos))
    cut = windows(tokens, samples, seqlen, source, bos)
    return cut[torch.randperm(len(cut), generator=generator(seed))[:samples]]


def evaluation_tokens(
    tokenizer: Any,
    texts: Iterable[str],
    samples: int | None,
    seqlen: int,
    source: str,
    bos: int | None = None,
    *,
    fewer: bool = False,
) -> Tensor:
    """The first ``samples`` windows (samples, seqlen), or all; no more text is read than needed.

    Where the text has not as many, that is an error, unless ``fewer`` will do. See `windows`.
    """
    limit = samples * text_width(seqlen, bos) if samples else None
    needed = None if fewer else samples
    return windows(tokenize(tokenizer, texts, limit), needed, seqlen, source, bos)[:samples]


def digest(tokens: Tensor) -> str:
    """SHA-256 of token ids and their shape."""
    shape = f"{tuple(tokens.shape)}\n".encode()
    return hashlib.sha256(shape + tokens.contiguous().numpy().tobytes()).hexdigest()
