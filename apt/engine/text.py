"""The texts of a run as tokens: for calibration or training, and for metrics."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apt.checkpoints.load import load_tokenizer
from apt.checkpoints.opened import Opened
from apt.errors import AptError
from apt.plugin.registry import Registry
from apt.text.datasets import documents, evaluation_tokens
from apt.text.ids import check_vocabulary
from apt.text.special_tokens import bos_of, special_ids


@dataclass(frozen=True)
class Text:
    """The texts of a run.

    Attributes:
        tokenizer: the tokenizer; None if the model has none.
        tokens: the token ids (samples, seqlen) to calibrate or to train on.
        held_out: token ids (windows, seqlen) to measure on; None to measure nothing.
        bos: the first token of every sample and window; None for no such token.
        special: the special tokens.
    """

    tokenizer: Any
    tokens: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    held_out: Tensor | None = None
    bos: int | None = None
    special: tuple[int, ...] = ()


def read_text(
    options: Any,
    skeleton: Opened,
    registry: Registry,
    draw: Callable[[Any, Iterable[str], int | None], Tensor],
    *,
    windows: int | None,
    measures: bool,
) -> Text:
    """Read and tokenise the text of a run.

    Args:
        options: the options of the run.
        draw: a function from the tokenizer, the documents and the first token of a sample to the
            samples.
        windows: the number of windows to measure on at most; None for all.
        measures: True if this rank measures.

    Raises:
        AptError: a data source or the tokenizer cannot be read, there is too little text, or a
            token has no embedding in the model.
    """
    tokenizer = load_tokenizer(skeleton.source, options.tokenizer)
    bos = bos_of(tokenizer) if options.bos else None
    texts: Iterable[str] = ()
    if options.samples != 0:
        texts = documents(options.calibration, "calibration", registry)
    tokens, held_out = draw(tokenizer, texts, bos), None
    check_vocabulary(tokens, skeleton.module, options.model)
    if options.evaluation is not None and measures:
        source = options.evaluation
        texts = documents(source, "evaluation", registry)
        held_out = evaluation_tokens(
            tokenizer, texts, windows, options.seqlen, source, bos, fewer=True
        )
        check_vocabulary(held_out, skeleton.module, options.model)
    return Text(tokenizer, tokens, held_out, bos, special_ids(tokenizer))


def check_same_vocabulary(model: Opened, dense: Opened) -> None:
    """Raise if two models have different numbers of tokens."""
    sizes = [m.module.get_input_embeddings().weight.shape[0] for m in (model, dense)]  # type: ignore[operator]
    if sizes[0] != sizes[1]:
        raise AptError(
            f"{model.source.reference} has {sizes[0]} tokens, and the dense model "
            f"{dense.source.reference} has {sizes[1]}",
            "compare a model with the one from which it was pruned",
        )
