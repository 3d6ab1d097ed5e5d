"""The texts of a run as tokens: for calibration or training, and for metrics."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from apt.adapter import Samples
from apt.checkpoints.load import load_tokenizer
from apt.checkpoints.opened import Opened
from apt.errors import AptError
from apt.locations.text_sources import labels
from apt.plugin.documents import has_template
from apt.plugin.registry import Registry
from apt.text.datasets import documents, evaluation_tokens, held_back_tokens
from apt.text.ids import check_vocabulary
from apt.text.mixes import Draw, Mix, SourceSamples, mixed_samples
from apt.text.special_tokens import bos_of, special_ids


@dataclass(frozen=True)
class Text:
    """The texts of a run.

    Attributes:
        tokenizer: the tokenizer; None if the model has none.
        tokens: the token ids (samples, seqlen) or other samples to calibrate or to train on.
        held_out: token ids (windows, seqlen) or other samples to measure on; None to measure
            nothing.
        bos: the first token of every sample and window; None for no such token.
        special: the special tokens.
        sources: the sources of the samples.
        owners: the index in ``sources`` of the source of each sample (samples,), or −1 for samples
            that the model generated; None if no source is known.
        others: windows (windows, seqlen) of the same sources that are not among the samples; None
            if they were not read.
    """

    tokenizer: Any
    tokens: Tensor | Samples = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    held_out: Tensor | Samples | None = None
    bos: int | None = None
    special: tuple[int, ...] = ()
    sources: tuple[SourceSamples, ...] = ()
    owners: Tensor | None = None
    others: Tensor | None = None

    @property
    def windows(self) -> Tensor:
        """The token ids (samples, seqlen) of a decoder of text."""
        assert isinstance(self.tokens, Tensor)
        return self.tokens

    @property
    def held_out_windows(self) -> Tensor | None:
        """The token ids (windows, seqlen) to measure a decoder of text on."""
        assert not isinstance(self.held_out, Samples)
        return self.held_out

    @property
    def own_samples(self) -> Tensor | None:
        """The samples that the model generated (samples, seqlen); None if there are none."""
        if self.owners is None or bool((self.owners >= 0).all()):
            return None
        return self.windows[self.owners < 0]

    @property
    def lacks_chat(self) -> bool:
        """True if the tokenizer has a chat template, and no source has conversations."""
        if isinstance(self.tokens, Samples):
            return False
        sampled = any(source.samples for source in self.sources)
        return sampled and has_template(self.tokenizer) and not any(s.chat for s in self.sources)

    @property
    def source_record(self) -> dict[str, Any]:
        """The sources of a mix, for the report; empty for one source."""
        if len(self.sources) < 2:
            return {}
        names = labels([source.name for source in self.sources])
        entries = [asdict(source) | {"name": names[source.name]} for source in self.sources]
        return {"sources": entries}


def read_text(
    options: Any,
    skeleton: Opened,
    registry: Registry,
    draw: Draw,
    *,
    samples: int,
    windows: int | None,
    measures: bool,
) -> Text:
    """Read and tokenise the text of a run.

    Args:
        options: the options of the run.
        draw: the function that draws the samples of one source.
        samples: the number of samples to draw, from all sources together.
        windows: the number of windows to measure on at most; None for all.
        measures: True if this rank measures.

    Raises:
        AptError: a data source or the tokenizer cannot be read, there is too little text, or a
            token has no embedding in the model.
    """
    tokenizer = load_tokenizer(skeleton.source, options.tokenizer)
    bos = bos_of(tokenizer) if options.bos else None
    mix = Mix(
        torch.empty(0, options.seqlen, dtype=torch.long), torch.empty(0, dtype=torch.long), ()
    )
    if options.samples != 0:
        mix = mixed_samples(options.calibration, tokenizer, registry, samples, bos, draw)
    check_vocabulary(mix.tokens, skeleton.module, options.model)
    held_out = None
    if options.evaluation is not None and measures:
        source = options.evaluation
        texts = documents(source, "evaluation", registry)
        held_out = evaluation_tokens(
            tokenizer, texts, windows, options.seqlen, source, bos, fewer=True
        )
        check_vocabulary(held_out, skeleton.module, options.model)
    special = special_ids(tokenizer)
    return Text(tokenizer, mix.tokens, held_out, bos, special, mix.sources, mix.owners)


def other_windows(
    options: Any, text: Text, skeleton: Opened, registry: Registry, share: float
) -> Tensor:
    """Calibration windows (windows, seqlen) that are not among the samples of a run.

    Args:
        options: the options of the run, with which the samples were drawn.
        text: the text of the run.
        share: the number of windows for each sample, at most 3. Short text has fewer or none.

    Raises:
        AptError: a data source cannot be read, or a token has no embedding in the model.
    """

    def draw(tokenizer: Any, texts: Any, samples: int, source: str, bos: int | None) -> Tensor:
        return held_back_tokens(
            tokenizer, texts, samples, options.seqlen, options.seed, source, bos, share=share
        )

    found = mixed_samples(
        options.calibration, text.tokenizer, registry, options.samples, text.bos, draw
    ).tokens
    check_vocabulary(found, skeleton.module, options.model)
    return found


def check_same_vocabulary(model: Opened, dense: Opened) -> None:
    """Raise if two models of text have different numbers of tokens."""
    if not (model.reads.text and dense.reads.text):
        return
    sizes = [m.module.get_input_embeddings().weight.shape[0] for m in (model, dense)]  # type: ignore[operator]
    if sizes[0] != sizes[1]:
        raise AptError(
            f"{model.source.reference} has {sizes[0]} tokens, and the dense model "
            f"{dense.source.reference} has {sizes[1]}",
            "compare a model with the one from which it was pruned",
        )
