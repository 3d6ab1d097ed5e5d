"""Samples of one source of text, or of several with shares."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from apt.locations.text_sources import TextSource, apportioned, text_sources
from apt.plugin.documents import Conversation, Document
from apt.plugin.registry import Registry
from apt.text.datasets import documents


class Draw(Protocol):
    """A function that draws samples from the documents of one source."""

    def __call__(
        self,
        tokenizer: Any,
        texts: Iterable[Document],
        samples: int,
        source: str,
        bos: int | None,
        /,
    ) -> Tensor:
        """The samples (samples, seqlen), or fewer."""


@dataclass(frozen=True)
class SourceSamples:
    """The samples of one source.

    Attributes:
        name: the name of the source.
        share: the share of the samples in the request.
        samples: the number of its samples.
        chat: True if its documents are conversations.
    """

    name: str
    share: float
    samples: int
    chat: bool = False


@dataclass(frozen=True)
class Mix:
    """Samples from several sources.

    Attributes:
        tokens: the token ids (samples, seqlen).
        owners: the index in ``sources`` of the source of each sample (samples,).
        sources: the sources.
    """

    tokens: Tensor
    owners: Tensor
    sources: tuple[SourceSamples, ...]


def mixed_samples(
    text: str, tokenizer: Any, registry: Registry, samples: int, bos: int | None, draw: Draw
) -> Mix:
    """Samples of the sources that a text names, see `text_sources`.

    The samples of a single source are in the order in which they were drawn. Those of a mix are in
    an order in which any first samples are of the sources by their shares, beginning with one of
    each. So what reads only the first samples reads all sources.

    Args:
        samples: the number of all samples.
        bos: the first token of every sample.
        draw: the function that draws the samples of one source.

    Raises:
        AptError: a source cannot be read or has too little text, or there are more sources than
            samples.
    """
    sources = text_sources(text)
    counts = apportioned(samples, sources) if len(sources) > 1 else [samples]
    drawn = [
        _drawn(source, tokenizer, registry, count, bos, draw)
        for source, count in zip(sources, counts, strict=True)
    ]
    parts = [tokens for tokens, _ in drawn]
    order = in_turn([len(part) for part in parts])
    owners = torch.cat([torch.full((len(part),), at) for at, part in enumerate(parts)])
    return Mix(torch.cat(parts)[order], owners[order], tuple(source for _, source in drawn))


def _drawn(
    source: TextSource,
    tokenizer: Any,
    registry: Registry,
    samples: int,
    bos: int | None,
    draw: Draw,
) -> tuple[Tensor, SourceSamples]:
    """The samples of one source, and their record."""
    seen = list[bool]()
    texts = _watched(documents(source.name, "calibration", registry), seen.append)
    tokens = draw(tokenizer, texts, samples, source.name, bos)
    return tokens, SourceSamples(source.name, source.share, len(tokens), any(seen))


def _watched(texts: Iterator[Document], tell: Callable[[bool], None]) -> Iterator[Document]:
    """The documents; the first one is told whether it is a conversation."""
    for number, document in enumerate(texts):
        if not number:
            tell(isinstance(document, Conversation))
        yield document


def in_turn(counts: Sequence[int]) -> Tensor:
    """The order of samples that lie source after source: one of each, then by their shares."""
    starts = [sum(counts[:at]) for at in range(len(counts))]
    taken = [0] * len(counts)
    order = list[int]()
    total = sum(counts)
    for place in range(total):
        # The source that is furthest behind its share; sources without a sample come first.
        behind = [
            (bool(taken[at] == 0), counts[at] * (place + 1) / total - taken[at], -at)
            if taken[at] < counts[at]
            else (False, float("-inf"), -at)
            for at in range(len(counts))
        ]
        chosen = max(range(len(counts)), key=behind.__getitem__)
        order.append(starts[chosen] + taken[chosen])
        taken[chosen] += 1
    return torch.tensor(order, dtype=torch.long)
