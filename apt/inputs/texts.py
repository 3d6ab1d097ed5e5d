"""Samples of text for encoders, and of pairs of texts for encoders with a decoder."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from apt.adapter import Sample, Samples
from apt.adapter.samples import ScoredPairs
from apt.errors import AptError
from apt.inputs.classes import class_numbers
from apt.plugin.documents import Conversation, Document, Label, Texts
from apt.plugin.registry import Registry
from apt.text.datasets import Split, documents
from apt.text.sampling import generator
from apt.text.special_tokens import special_ids


@dataclass(frozen=True)
class Passage:
    """A text, or a text with a second one: its answer, its translation, its summary.

    Attributes:
        texts: the text or both texts.
        label: its class; None if it is not known.
        score: how similar people found both texts; None if it is not known.
    """

    texts: tuple[str, ...]
    label: Label | None = None
    score: float | None = None


_PARAGRAPHS = re.compile(r"\n\s*\n")
_SHORTEST = 8  # tokens of a sample, unless its text is shorter
_STEPS = 4  # lengths of samples between a length and twice that length
_READ = 4  # passages that are read for each sample, so that seeds give different samples


def passages(documents: Iterable[Document]) -> Iterator[Passage]:
    """The paragraphs of plain text, and the texts and pairs of texts of other documents.

    A conversation of more than two messages gives a pair for each answer.
    """
    for document in documents:
        if isinstance(document, Conversation):
            texts = [text.strip() for role, text in document.messages if role != "system"]
            pairs = zip(texts[::2], texts[1::2], strict=False)
            yield from (Passage(pair) for pair in pairs if all(pair))
        elif isinstance(document, Texts):
            texts = [text.strip() for text in document.parts]
            if all(texts):
                yield Passage(tuple(texts), document.label, document.score)
        else:
            paragraphs = (text.strip() for text in _PARAGRAPHS.split(document))
            yield from (Passage((text,)) for text in paragraphs if text)


def drawn_passages(
    documents: Iterable[Document], count: int, seed: int, source: str, *, fewer: bool = False
) -> list[Passage]:
    """``count`` passages in an order drawn by ``seed``.

    Args:
        source: the name of the text's source, for messages.
        fewer: True if the source may have fewer passages; at least one.

    Raises:
        AptError: the source has fewer passages.
    """
    read = list(islice(passages(documents), _READ * count))
    if len(read) < (1 if fewer else count):
        raise AptError(
            f"too little text: {source} has {len(read)} passages, but {count} are needed",
            "use fewer samples or more text",
            ("samples",),
        )
    order = torch.randperm(len(read), generator=generator(seed))[:count]
    return [read[index] for index in order.tolist()]


@dataclass(frozen=True)
class TextReader:
    """Reads texts of their natural length, with the special tokens that the tokenizer adds.

    A sample is as long as its text, up to ``longest``. Its end is cut to the nearest of a few
    lengths, so that batches have samples of equal lengths.

    Args:
        tokenizer: the tokenizer of the model.
        longest: the greatest number of tokens of a sample.
        model: the model, if its decoder reads the second texts of pairs; else None.
        padded: True to fill all samples up to ``longest``, for models that read the padding.
        classes: the numbers of the classes of the model by their names.
        alone: True if the model reads each text of a pair with a score alone, as a sentence encoder
            does.
        first: True if the vector of a text is the state of its first token; see `Samples`.
    """

    tokenizer: Any
    longest: int
    model: Any = None
    padded: bool = False
    classes: Mapping[str, int] = field(default_factory=dict)
    alone: bool = False
    first: bool = False

    def read(
        self,
        source: str,
        split: Split,
        count: int,
        seed: int,
        registry: Registry,
        *,
        fewer: bool = False,
    ) -> Samples:
        """Samples in an order drawn by ``seed``.

        Args:
            source: the name of a data set, or the path of a file.
            fewer: True if the source may have fewer texts; at least one.

        Raises:
            AptError: the source cannot be read, has too little text or another class than the
                model, or a token has no embedding.
        """
        texts = drawn_passages(documents(source, split, registry), count, seed, source, fewer=fewer)
        encode = self._pair if self.model is not None else self.encode
        pairs = [text for text in texts if len(text.texts) > 1]
        scores = [text.score for text in pairs if text.score is not None]
        scored = self.alone and len(scores) == len(texts)
        samples = [encode(text.texts[:1] if scored else text.texts) for text in texts]
        check_alike(samples, f"some texts of {source} have a second text, and others have none")
        labels = class_numbers([text.label for text in texts], self.classes, source)
        read = Samples(
            samples, self.tokenizer.mask_token_id, special_ids(self.tokenizer), labels,
            first=self.first,
        )  # fmt: skip
        if scored:
            others = read.with_samples([encode(text.texts[1:]) for text in texts])
            read.pairs = ScoredPairs(others, torch.tensor(scores))
        return read

    def encode(self, text: tuple[str, ...]) -> Sample:
        """The tensors of a text, or of a pair of texts."""
        if self.padded:
            most = {"truncation": True, "max_length": self.longest, "padding": "max_length"}
            return {"input_ids": torch.tensor(self.tokenizer(*text, **most)["input_ids"])}
        length = len(self.tokenizer(*text, truncation=True, max_length=self.longest)["input_ids"])
        kept = self.tokenizer(*text, truncation=True, max_length=near_length(length))
        names = (name for name in ("input_ids", "token_type_ids") if name in kept)
        return {name: torch.tensor(kept[name]) for name in names}

    def _pair(self, text: tuple[str, ...]) -> Sample:
        """The tokens of the first text for the encoder, and of the second one for the decoder."""
        ids = self.encode(text[:1])["input_ids"]
        return {"input_ids": ids, **(self.target(text[1]) if len(text) > 1 else {})}

    def target(self, text: str) -> Sample:
        """The tokens that the decoder reads of its output."""
        most = {"truncation": True, "max_length": self.longest}
        labels = torch.tensor(self.tokenizer(text_target=text, **most)["input_ids"])
        return {"decoder_input_ids": cut(_shifted(labels, self.model))}


def check_alike(samples: Sequence[Sample], message: str) -> None:
    """Raise `AptError` if only some samples have the inputs of a decoder."""
    named = {name for sample in samples for name in sample}
    if any(named != set(sample) for sample in samples):
        raise AptError(message, "give a second text for all of them, or none", ("calibration",))


def near_length(length: int) -> int:
    """The longest of a few lengths, four between powers of two, that is not above ``length``."""
    if length <= _SHORTEST:
        return length
    octave: int = 2 ** (length.bit_length() - 1)
    step: int = max(1, octave // _STEPS)
    return octave + (length - octave) // step * step


def cut(ids: Tensor) -> Tensor:
    """The first tokens of ids (tokens,): as many as the `near_length`."""
    return ids[: near_length(len(ids))]


def _shifted(labels: Tensor, model: Any) -> Tensor:
    """The inputs of a decoder (tokens,) whose outputs should be ``labels`` (tokens,)."""
    start = model.config.decoder_start_token_id
    if start is None:
        raise AptError(
            f"{type(model).__name__} has no decoder_start_token_id",
            "add it to the model's config.json",
        )
    if labels[:1].tolist() == [start]:  # Whisper's tokenizer adds it
        return labels[:-1]
    return torch.cat([labels.new_tensor([start]), labels[:-1]])
