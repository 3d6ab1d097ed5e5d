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

    The samples of a single source stay in the order in which they were drawn. In a mix, the order
    begins with one sample of each source, and goes on so that the first n samples have about the
    shares of the mix, for each n. So a step that reads only the first samples reads all sources.

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
        _samples_of(source, tokenizer, registry, count, bos, draw)
        for source, count in zip(sources, counts, strict=True)
    ]
    parts = [tokens for tokens, _ in drawn]
    order = in_turn([len(part) for part in parts])
    owners = torch.cat([torch.full((len(part),), index) for index, part in enumerate(parts)])
    return Mix(torch.cat(parts)[order], owners[order], tuple(source for _, source in drawn))


def _samples_of(
    source: TextSource,
    tokenizer: Any,
    registry: Registry,
    samples: int,
    bos: int | None,
    draw: Draw,
) -> tuple[Tensor, SourceSamples]:
    """The samples of one source, and their record."""
    first_is_chat = list[bool]()
    texts = _reporting_first(documents(source.name, "calibration", registry), first_is_chat.append)
    tokens = draw(tokenizer, texts, samples, source.name, bos)
    return tokens, SourceSamples(source.name, source.share, len(tokens), any(first_is_chat))


def _reporting_first(
    texts: Iterator[Document], report: Callable[[bool], None]
) -> Iterator[Document]:
    """The same documents; ``report`` is called with True if the first one is a conversation."""
    for number, document in enumerate(texts):
        if not number:
            report(isinstance(document, Conversation))
        yield document


def in_turn(counts: Sequence[int]) -> Tensor:
    """The order of a mix for samples that lie source after source; see `mixed_samples`."""
    starts = [sum(counts[:source]) for source in range(len(counts))]
    taken = [0] * len(counts)
    order = list[int]()
    total = sum(counts)
    for position in range(total):
        # The source that is furthest behind its share; sources without a sample come first.
        priorities = [
            (
                bool(taken[source] == 0),
                counts[source] * (position + 1) / total - taken[source],
                -source,
            )
            if taken[source] < counts[source]
            else (False, float("-inf"), -source)
            for source in range(len(counts))
        ]
        chosen = max(range(len(counts)), key=priorities.__getitem__)
        order.append(starts[chosen] + taken[chosen])
        taken[chosen] += 1
    return torch.tensor(order, dtype=torch.long)
