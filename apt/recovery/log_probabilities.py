"""Log-probabilities of tokens from logits, with little memory beyond the logits."""

from typing import Any

import torch
from torch import Tensor

_ROWS = 32  # rows of logits that are converted to fp32 at a time


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log-probabilities (…, count) of some tokens in fp32, with gradients.

    Args:
        logits: logits (…, vocabulary) of any dtype.
        tokens: the tokens (…, count).
    """
    found: Tensor = _LogProbabilities.apply(logits, tokens)  # type: ignore[no-untyped-call]
    return found


class _LogProbabilities(torch.autograd.Function):
    """The log-probabilities of some tokens, from logits (…, vocabulary) of any dtype.

    The logits of a large vocabulary are the largest tensors of a training. So only a few rows at a
    time are converted to fp32, in one buffer, and the gradient has the dtype of the logits.
    """

    @staticmethod
    def forward(context: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        """The log-probabilities of ``tokens`` (…, top), in fp32."""
        rows = torch.split(logits.flatten(0, -2), _ROWS)
        buffer = _buffer(logits)
        norms = torch.cat([_log_sum_exp(buffer[: len(part)].copy_(part)) for part in rows])
        norms = norms.view(*logits.shape[:-1], 1)
        context.save_for_backward(logits, tokens, norms)
        return logits.gather(-1, tokens).float() - norms

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient of the logits."""
        result = torch.empty_like(context.saved_tensors[0], memory_format=torch.contiguous_format)
        buffer = _buffer(result)
        tensors = (result, *context.saved_tensors, *gradients)
        parts = [torch.split(tensor.flatten(0, -2), _ROWS) for tensor in tensors]
        for out, logits, tokens, norms, gradient in zip(*parts, strict=True):
            probabilities = buffer[: len(logits)].copy_(logits).sub_(norms).exp_()
            probabilities.mul_(-gradient.sum(-1, keepdim=True))
            out.copy_(probabilities.scatter_add_(-1, tokens, gradient))
        return result, None


def _buffer(logits: Tensor) -> Tensor:
    """Space for a few rows of logits in fp32."""
    return torch.empty(_ROWS, logits.shape[-1], device=logits.device)


def _log_sum_exp(logits: Tensor) -> Tensor:
    """The logarithm of the sum of the exponentials of each row (rows, 1); changes ``logits``."""
    largest = logits.amax(-1, keepdim=True)
    return logits.sub_(largest).exp_().sum(-1, keepdim=True).log_().add_(largest)
