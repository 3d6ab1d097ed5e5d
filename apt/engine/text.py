"""The texts of a run as tokens: for calibration, and for metrics."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from apt.checkpoints.load import load_tokenizer
from apt.checkpoints.model import Model
from apt.engine.prepare import Prepared
from apt.errors import AptError
from apt.text.datasets import calibration_tokens, documents, evaluation_tokens
from apt.text.special_tokens import bos_of, special_ids


@dataclass(frozen=True)
class Text:
    """The texts of a run.

    Attributes:
        tokenizer: the tokenizer.
        tokens: the given calibration token ids (samples, seqlen).
        held_out: token ids (windows, seqlen) to measure on; None to measure nothing.
        bos: the first token of every sample and window; None for no such token.
        special: the special tokens.
    """

    tokenizer: Any
    tokens: Tensor
    held_out: Tensor | None
    bos: int | None
    special: tuple[int, ...]

    def check(self, model: nn.Module, reference: str) -> None:
        """Raise if a token has no embedding in the model."""
        for tokens in (self.tokens, self.held_out):
            if tokens is not None:
                check_vocabulary(tokens, model, reference)


def read_text(prepared: Prepared) -> Text:
    """Read and tokenise the text of a run.

    Raises:
        AptError: a data source or the tokenizer cannot be read, or there is too little text.
    """
    options = prepared.options
    tokenizer = load_tokenizer(prepared.shell.source, options.tokenizer)
    bos = bos_of(tokenizer) if options.bos else None
    given = _calibration(prepared, tokenizer, bos)
    held_out = _held_out(prepared, tokenizer, bos) if options.evaluation else None
    return Text(tokenizer, given, held_out, bos, special_ids(tokenizer))


def _calibration(prepared: Prepared, tokenizer: Any, bos: int | None) -> Tensor:
    options, source = prepared.options, prepared.options.calibration
    found: Iterable[str] = ()
    if options.samples:
        found = documents(source, "calibration", prepared.registry, options.hub.token)
    return calibration_tokens(
        tokenizer, found, options.samples, options.seqlen, options.seed, source, bos
    )


def _held_out(prepared: Prepared, tokenizer: Any, bos: int | None) -> Tensor:
    options, source = prepared.options, str(prepared.options.evaluation)
    found = documents(source, "evaluation", prepared.registry, options.hub.token)
    most = options.samples or prepared.augmentation.own_samples
    return evaluation_tokens(tokenizer, found, most, options.seqlen, source, bos, fewer=True)


def check_vocabulary(tokens: Tensor, module: nn.Module, reference: str) -> None:
    """Raise if a token has no embedding, as far as the model says which embeddings it has."""
    try:
        vocabulary = module.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise AptError(
            f"the tokenizer of {reference} gives ids from {int(tokens.min())} to "
            f"{int(tokens.max())}, but the model has {vocabulary} embeddings",
            "the tokenizer belongs to another model",
        )


def check_same_vocabulary(model: Model, dense: Model) -> None:
    """Raise if two models have different numbers of tokens."""
    sizes = [m.module.get_input_embeddings().weight.shape[0] for m in (model, dense)]  # type: ignore[operator]
    if sizes[0] != sizes[1]:
        raise AptError(
            f"{model.source.reference} has {sizes[0]} tokens, and the dense model "
            f"{dense.source.reference} has {sizes[1]}",
            "compare a model with the one from which it was pruned",
        )
