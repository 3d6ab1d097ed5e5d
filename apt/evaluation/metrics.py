"""Metrics of a language model on text, alone or in comparison with the dense model."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from apt.adapter import Samples
from apt.adapter.recording import eval_mode
from apt.adapter.wrapped import check_in_memory
from apt.arguments import checked
from apt.evaluation.logits import parts_of_logits
from apt.evaluation.outputs import class_accuracy
from apt.modes import default_modes
from apt.text.ids import check_ids, check_vocabulary

_TOKENS_PER_BATCH = 2048


def windows_at_once(seqlen: int) -> int:
    """The number of windows of ``seqlen`` tokens in a batch."""
    return max(1, _TOKENS_PER_BATCH // seqlen)


@default_modes()
@torch.no_grad()
@checked
def perplexity(model: nn.Module, tokens: Tensor) -> float:
    """The exponential of the mean negative log-likelihood of the tokens of separate windows.

    Windows do not overlap and share no context (a stride of one window). The first token of a
    window is not predicted. This is the protocol of the GPTQ, SparseGPT and Wanda papers.

    Args:
        model: a causal language model of transformers.
        tokens: token ids (windows, seqlen).

    Raises:
        AptError: the tokens are not ids of the model, or the model is not in memory.
    """

    def losses(logits: Tensor, following: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.float(), following, reduction="sum")

    return math.exp(min(_mean(model, tokens, losses), 700.0))


@default_modes()
@torch.no_grad()
@checked
def accuracy(model: nn.Module, tokens: Tensor | Samples) -> float:
    """The share of tokens that the model ranks first, without the first token of each window.

    Or the share of samples whose class the model ranks first, of a model that classifies.

    Args:
        model: a model of transformers that predicts the next token, or classes.
        tokens: token ids (windows, seqlen), or samples with their classes.

    Raises:
        AptError: the classes of the samples are not known.
    """
    if isinstance(tokens, Samples):
        return class_accuracy(model, tokens)
    return _mean(model, tokens, lambda logits, following: (logits.argmax(-1) == following).sum())


@default_modes()
@torch.no_grad()
@checked
def divergence(model: nn.Module, tokens: Tensor, dense: nn.Module) -> float:
    """The mean Kullback-Leibler divergence of the next token from the dense model, in nats.

    Args:
        model: a causal language model of transformers.
        tokens: token ids (windows, seqlen); the last token of a window has no next token.
        dense: the dense model, of the same vocabulary.
    """

    def total(logits: Tensor, expected: Tensor) -> Tensor:
        pair = logits.float().log_softmax(-1), expected.float().log_softmax(-1)
        return nn.functional.kl_div(*pair, log_target=True, reduction="sum")

    return _mean_difference(model, tokens, dense, total)


@default_modes()
@torch.no_grad()
@checked
def agreement(model: nn.Module, tokens: Tensor, dense: nn.Module) -> float:
    """The share of tokens after which both models rank the same next token first.

    The arguments are those of `divergence`.
    """
    return _mean_difference(
        model,
        tokens,
        dense,
        lambda logits, expected: (logits.argmax(-1) == expected.argmax(-1)).sum(),
    )


def _mean_difference(
    model: nn.Module, tokens: Tensor, dense: nn.Module, measure: Callable[[Tensor, Tensor], Tensor]
) -> float:
    """The mean of ``measure`` over tokens, of the logits (n, vocabulary) of both models."""
    _check(model, tokens)
    _check(dense, tokens)
    device, total, predicted = next(model.parameters()).device, 0.0, tokens.shape[1] - 1
    with eval_mode(model), eval_mode(dense):
        for batch in torch.split(tokens, windows_at_once(tokens.shape[1])):
            start = 0
            for pair in _pairs(model, dense, batch.to(device)):
                logits, expected = (
                    part[:, : max(0, predicted - start)].flatten(0, 1) for part in pair
                )
                start += pair[0].shape[1]
                total += float(measure(logits, expected))
    return total / (tokens.shape[0] * predicted)


def _check(model: nn.Module, tokens: Tensor) -> None:
    """Raise `AptError` if a model cannot be measured on ``tokens``."""
    check_in_memory(model, streamed=True)
    check_ids(tokens, least=2)
    check_vocabulary(tokens, model, "these tokens")


def _pairs(model: nn.Module, dense: nn.Module, batch: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The parts of the logits of both models; ``model`` and ``dense`` may be one model."""
    if model is dense:
        return ((part, part) for part in parts_of_logits(model, batch))
    return zip(parts_of_logits(model, batch), parts_of_logits(dense, batch), strict=True)


def _mean(model: nn.Module, tokens: Tensor, measure: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The mean over tokens of ``measure``, which returns a sum over n tokens.

    Its arguments are the logits (n, vocabulary) and the tokens (n,) that follow. Only a part of the
    logits is in memory at a time, see `apt.evaluation.logits`.
    """
    _check(model, tokens)
    device, total = next(model.parameters()).device, 0.0
    with eval_mode(model):
        for batch in torch.split(tokens, windows_at_once(tokens.shape[1])):
            start = 1
            for logits in parts_of_logits(model, batch := batch.to(device)):
                following = batch[:, start : start + logits.shape[1]]
                start += logits.shape[1]
                predicting = logits[:, : following.shape[1]]
                total += float(measure(predicting.flatten(0, 1), following.flatten()))
    return total / (tokens.shape[0] * (tokens.shape[1] - 1))
