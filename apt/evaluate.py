"""Perplexity, as the field measures it."""

import math

import torch
from torch import Tensor, nn

_TOKENS_PER_BATCH = 2048


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor) -> float:
    """The exponential of the mean negative log-likelihood of the tokens of separate windows.

    Windows do not overlap and share no context (a stride of one window), and the first token of
    each is not predicted: the protocol of the GPTQ, SparseGPT and Wanda papers.

    Args:
        model: a causal language model of transformers.
        tokens: token ids (windows, seqlen).
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    total = 0.0
    for batch in torch.split(tokens, max(1, _TOKENS_PER_BATCH // tokens.shape[1])):
        batch = batch.to(device)
        logits = model(batch, use_cache=False).logits[:, :-1]
        losses = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
        )
        total += float(losses)
    model.train(training)
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    return math.exp(min(total / predicted, 700.0))
