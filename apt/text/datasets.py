"""From text to tokens: data sources, packing into windows, sampling."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from apt.adapter import Samples
from apt.errors import AptError, first_line, shortened, unknown_name
from apt.locations.hub import no_answer, offline, reachable
from apt.locations.paths import expanded, kind_at
from apt.plugin.documents import Conversation, Document, has_template
from apt.plugin.registry import Registry
from apt.text.files import ENDINGS, SUFFIXES, document_of, read_file
from apt.text.sampling import generator
from apt.text.special_tokens import bos_of

Split = Literal["calibration", "evaluation"]
T = TypeVar("T")
_CHARACTERS_PER_TOKEN = 32  # far above the mean of any tokenizer: enough text is always read


def documents(source: str, split: Split, registry: Registry) -> Iterator[Document]:
    """The documents of a data source.

    Args:
        source: a name that a plugin provides (``builtin``, ``wikitext2``), a local .txt, .jsonl or
            .parquet file, or a hub data set, ``OWNER/NAME`` or ``OWNER/NAME:CONFIG``.
        split: the part to read; a local file has one part for both.

    Raises:
        AptError: the source does not exist or cannot be read.
    """
    if source.lower() in map(str.lower, registry.calibrations.specs):
        return registry.calibrations.get(source).documents(split)
    path = expanded(source)
    kind = kind_at(path) if source else None
    if kind == "file":
        return read_file(path)
    names_file = path.suffix in ENDINGS or (path.suffix and "/" not in source)  # not `org/text:1.0`
    if kind == "directory":
        message = f"{shortened(source)} is a folder, and texts are read from one file"
        raise AptError(message, f"give {SUFFIXES}")
    if kind or names_file or source.startswith((".", "/", "~")):
        raise AptError(f"no such data set: {shortened(source)} is no file", f"give {SUFFIXES}")
    if "/" not in source:
        raise unknown_name("data set", source, registry.calibrations.specs)
    name, _, config = source.partition(":")
    return hub_documents(name, config or None, split)


def hub_documents(
    name: str,
    config: str | None,
    split: Split,
    files: dict[str, str] | None = None,
    revision: str | None = None,
    token: str | None = None,
    called: str | None = None,
    parts: Mapping[Split, str] | None = None,
) -> Iterator[Document]:
    """The documents of a data set, streamed by `datasets`; see `hub_rows`."""
    return hub_rows(
        name, config, split, document_of, files, revision=revision, token=token, called=called,
        parts=parts,
    )  # fmt: skip


def hub_rows(
    name: str,
    config: str | None,
    split: Split,
    read: Callable[[Any, str], T],
    files: dict[str, str] | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    called: str | None = None,
    parts: Mapping[Split, str] | None = None,
) -> Iterator[T]:
    """What is read from each row of a data set, streamed by `datasets`.

    Args:
        name: a hub name, or a builder such as ``parquet`` with local ``files``.
        read: reads a row, called with the row and its place for messages. Images and sounds of a
            row are as they are stored, with their bytes and their path.
        config: the data set's configuration.
        split: calibration reads ``train``; evaluation reads ``test``, else ``validation``. A split
            whose classes are unknown, as that of GLUE's tests, comes after the other.
        files: the files of each split of the data set.
        revision: a branch of the data set's repository.
        token: the access token of the hub.
        called: the name in messages; ``name`` by default.
        parts: the names of the data set's own splits, if they have others.

    Raises:
        AptError: the hub does not answer, or the data set cannot be read.
    """
    called = called or name
    remote = "/" in name or any("://" in path for path in (files or {}).values())
    if remote and not offline() and not reachable():
        message = f"data set '{called}' is on the hub, and {no_answer()}"
        raise AptError(message, "check the network, or give a local file")
    import datasets

    split_names = ("train",) if split == "calibration" else ("test", "validation")
    split_names = (parts[split],) if parts is not None and split in parts else split_names
    try:
        splits = datasets.load_dataset(
            name, config, data_files=files, revision=revision, token=token, streaming=True
        )
        keys = [key for name in split_names if (key := _split_of(splits, name)) is not None]
        part = splits[keys[0]] if keys else None
        if len(keys) > 1 and _is_unlabelled(part):
            part = splits[keys[1]]
        if part is None:
            raise ValueError(f"it has no split {' or '.join(split_names)}")
        for column, feature in (part.features or {}).items():
            if isinstance(feature, datasets.Image | datasets.Audio):
                part = part.cast_column(column, type(feature)(decode=False))
        classes = getattr((part.features or {}).get("label"), "names", None)
        for number, row in enumerate(part, 1):
            if classes and isinstance(row["label"], int) and row["label"] >= 0:
                row = {**row, "label_text": classes[row["label"]]}
            yield read(row, f"row {number}")
    except Exception as error:  # the exceptions of `datasets` have no common base class
        message = f"data set '{called}' cannot be read: {first_line(error)}"
        raise AptError(message, "check the name and the network, or give a local file") from error


def _split_of(splits: Iterable[str], name: str) -> str | None:
    """The split of a name, or the first one of several such as ``validation_matched``."""
    if name in splits:
        return name
    return next((key for key in splits if key.startswith(f"{name}_")), None)


def _is_unlabelled(part: Any) -> bool:
    """True for a split whose rows have −1 for their unknown class."""
    if "label" not in (part.features or {}):
        return False
    return any(row["label"] == -1 for row in islice(part, 1))


def tokenize(tokenizer: Any, texts: Iterable[Document], limit: int | None = None) -> Tensor:
    """The ids (tokens,) of documents: at least ``limit``, or all of them.

    Documents are joined by blank lines. Conversations that a chat template renders have end tokens
    of the template and are joined without blank lines.
    """
    parts, size, join = list[str](), 0, "\n\n"
    for document in texts:
        if isinstance(document, Conversation):
            join = "" if has_template(tokenizer) else join
            text = document.rendered(tokenizer)
        else:
            text = document
        parts.append(text)
        size += len(text)
        if limit is not None and size >= limit * _CHARACTERS_PER_TOKEN:
            break
    return token_ids(tokenizer, join.join(parts))


def token_ids(tokenizer: Any, text: str) -> Tensor:
    """The ids (tokens,) of a text, without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if ids[:1] == [bos_of(tokenizer)]:  # some tokenizers ignore add_special_tokens=False
        ids = ids[1:]
    return torch.tensor(ids, dtype=torch.long)


def windows(
    tokens: Tensor, samples: int | None, seqlen: int, source: str, bos: int | None = None
) -> Tensor:
    """Cut ``tokens`` (tokens,) into consecutive windows (windows, seqlen), at least ``samples``.

    Args:
        samples: the number of windows needed; None for one.
        source: the name of the text's source, for messages.
        bos: the first token of each window, before ``seqlen - 1`` tokens of text; None for text
            alone.

    Raises:
        AptError: the text has fewer windows.
    """
    width = text_width(seqlen, bos)
    count = len(tokens) // width
    if count < (samples or 1):
        advice = f"use {count} samples, a smaller seqlen" if count else "use a smaller seqlen"
        raise AptError(
            f"too little text: {source} gives {len(tokens):,} tokens, {count} samples of {seqlen}, "
            f"but {samples or 1} are needed",
            f"{advice} or more text",
            ("samples", "seqlen") if count else ("seqlen",),
        )
    return with_bos(tokens[: count * width].view(count, width), bos)


def text_width(seqlen: int, bos: int | None) -> int:
    """The number of text tokens in a window: all but the BOS token."""
    return seqlen if bos is None else seqlen - 1


def with_bos(texts: Tensor, bos: int | None) -> Tensor:
    """``texts`` (samples, width), each behind ``bos`` unless it is None."""
    if bos is None:
        return texts
    return torch.cat([texts.new_full((len(texts), 1), bos), texts], dim=1)


def calibration_tokens(
    tokenizer: Any,
    texts: Iterable[Document],
    samples: int,
    seqlen: int,
    seed: int,
    source: str,
    bos: int | None = None,
) -> Tensor:
    """Windows (samples, seqlen) drawn by ``seed``, without overlap; see `windows`."""
    return _in_drawn_order(tokenizer, texts, samples, seqlen, seed, source, bos)[:samples]


def held_back_tokens(
    tokenizer: Any,
    texts: Iterable[Document],
    samples: int,
    seqlen: int,
    seed: int,
    source: str,
    bos: int | None = None,
    *,
    share: float,
) -> Tensor:
    """Windows (windows, seqlen) that `calibration_tokens` of the same arguments does not draw.

    Args:
        share: the number of windows for each sample, at most 3. Short text has fewer or none.
    """
    count = math.ceil(samples * share)
    drawn = _in_drawn_order(tokenizer, texts, samples, seqlen, seed, source, bos)
    return drawn[samples : samples + count]


def _in_drawn_order(
    tokenizer: Any,
    texts: Iterable[Document],
    samples: int,
    seqlen: int,
    seed: int,
    source: str,
    bos: int | None,
) -> Tensor:
    """All windows of the text that is read for a number of samples, in an order by ``seed``."""
    if not samples:
        return torch.empty(0, seqlen, dtype=torch.long)
    # Read four times as many windows as samples, so that seeds give different samples.
    tokens = tokenize(tokenizer, texts, limit=4 * samples * text_width(seqlen, bos))
    all_windows = windows(tokens, samples, seqlen, source, bos)
    return all_windows[torch.randperm(len(all_windows), generator=generator(seed))]


def training_tokens(
    tokenizer: Any,
    texts: Iterable[Document],
    most: int,
    seqlen: int,
    seed: int,
    source: str,
    bos: int | None = None,
) -> Tensor:
    """At most ``most`` windows (windows, seqlen), in an order drawn by ``seed``; see `windows`."""
    tokens = tokenize(tokenizer, texts, limit=most * text_width(seqlen, bos))
    all_windows = windows(tokens, None, seqlen, source, bos)[:most]
    return all_windows[torch.randperm(len(all_windows), generator=generator(seed))]


def evaluation_tokens(
    tokenizer: Any,
    texts: Iterable[Document],
    samples: int | None,
    seqlen: int,
    source: str,
    bos: int | None = None,
    *,
    fewer: bool = False,
) -> Tensor:
    """The first ``samples`` windows (samples, seqlen), or all; only the text needed is read.

    If the text has fewer windows, this is an error, unless ``fewer`` is True. The other arguments
    are those of `windows`.
    """
    limit = samples * text_width(seqlen, bos) if samples else None
    needed = None if fewer else samples
    return windows(tokenize(tokenizer, texts, limit), needed, seqlen, source, bos)[:samples]


def digest(tokens: Tensor | Samples) -> str:
    """The SHA-256 of token ids and their shape, or of other samples."""
    if isinstance(tokens, Samples):
        return tokens.digest()
    shape = f"{tuple(tokens.shape)}\n".encode()
    return hashlib.sha256(shape + tokens.contiguous().numpy().tobytes()).hexdigest()
