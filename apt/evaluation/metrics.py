"""Metrics of a language model on text: perplexity and accuracy."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from apt.adapter.eval_mode import eval_mode
from apt.evaluation.logits import parts_of_logits

_TOKENS_PER_BATCH = 2048


def windows_at_once(seqlen: int) -> int:
    """The number of windows of ``seqlen`` tokens in a batch."""
    return max(1, _TOKENS_PER_BATCH // seqlen)


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor) -> float:
    """The exponential of the mean negative log-likelihood of the tokens of separate windows.

    Windows do not overlap and share no context (a stride of one window), and the first token of
    each is not predicted: the protocol of the GPTQ, SparseGPT and Wanda papers.

    Args:
        model: a causal language model of transformers.
        tokens: token ids (windows, seqlen).
    """

    def losses(logits: Tensor, following: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.float(), following, reduction="sum")

    return math.exp(min(_mean(model, tokens, losses), 700.0))


@torch.no_grad()
def accuracy(model: nn.Module, tokens: Tensor) -> float:
    """The share of tokens that the model ranks first, without the first token of each window.

    Args:
        model: a causal language model of transformers.
        tokens: token ids (windows, seqlen).
    """
    return _mean(model, tokens, lambda logits, following: (logits.argmax(-1) == following).sum())


def _mean(model: nn.Module, tokens: Tensor, measure: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The mean over tokens of ``measure``, which returns a sum over n tokens.

    Its arguments are the logits (n, vocabulary) and the tokens (n,) that follow. Only a part of the
    logits is in memory at a time, see `apt.evaluation.logits`.
    """
    device, total = next(model.parameters()).device, 0.0
    with eval_mode(model):
        for batch in torch.split(tokens, windows_at_once(tokens.shape[1])):
            total += _total(model, batch.to(device), measure)
    return total / (tokens.shape[0] * (tokens.shape[1] - 1))


def _total(model: nn.Module, batch: Tensor, measure: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The sum of ``measure`` over the windows of a batch (windows, seqlen)."""
    total, place = 0.0, 1
    for logits in parts_of_logits(model, batch):
        following = batch[:, place : place + logits.shape[1]]
        place += logits.shape[1]
        seen = logits[:, : following.shape[1]]
        total += float(measure(seen.flatten(0, 1), following.flatten()))
    return total
