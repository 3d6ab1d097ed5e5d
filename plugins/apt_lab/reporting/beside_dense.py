"""A pruned model and the dense one: losses of frequent and rare tokens, and generated text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apt.evaluation.logits import parts_of_logits
from apt.evaluation.metrics import windows_at_once
from apt.extending import eval_mode

_EDGES = (1, 3, 9, 27, 81)  # the largest counts of the groups of tokens


@dataclass(frozen=True)
class FrequencyGroup:
    """Tokens that occur about equally often in the measured text.

    Attributes:
        label: the numbers of occurrences, in words.
        share: the share of these tokens among the predicted tokens.
        dense, pruned: the mean loss of each model on these tokens, in nats.
    """

    label: str
    share: float
    dense: float
    pruned: float


@dataclass(frozen=True)
class Continuation:
    """The beginning of a text, and its continuation by each model."""

    prompt: str
    dense: str
    pruned: str


@torch.no_grad()
def token_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """The loss of each predicted token (windows, seqlen − 1), in nats.

    Args:
        tokens: token ids (windows, seqlen).
    """
    device, all_losses = next(model.parameters()).device, []
    with eval_mode(model):
        for batch in torch.split(tokens, windows_at_once(tokens.shape[1])):
            following = batch.to(device)[:, 1:]
            losses, position = [], 0
            for logits in parts_of_logits(model, batch.to(device)):
                targets = following[:, position : position + logits.shape[1], None]
                position += logits.shape[1]
                logs = logits[:, : targets.shape[1]].float().log_softmax(-1)
                losses.append(-logs.gather(2, targets).squeeze(2).cpu())
            all_losses.append(torch.cat(losses, 1))
    return torch.cat(all_losses)


def by_frequency(tokens: Tensor, dense: Tensor, pruned: Tensor) -> list[FrequencyGroup]:
    """The mean losses of both models by how often a token occurs in the text.

    Args:
        tokens: token ids (windows, seqlen).
        dense, pruned: the losses of both models, see `token_losses`.
    """
    counts = torch.bincount(tokens.flatten())[tokens[:, 1:]]
    groups, low = list[FrequencyGroup](), 0
    for high in (*_EDGES, int(counts.max())):
        in_group = (counts > low) & (counts <= high)
        if in_group.any():
            groups.append(
                FrequencyGroup(
                    _label(low + 1, high),
                    float(in_group.double().mean()),
                    float(dense[in_group].double().mean()),
                    float(pruned[in_group].double().mean()),
                )
            )
        low = max(low, high)
    return groups


def _label(low: int, high: int) -> str:
    if low == high:
        return "once" if low == 1 else f"{low} times"
    return f"{low}–{high} times"


@torch.no_grad()
def continuations(
    models: Sequence[Any], tokenizer: Any, prompts: Sequence[Tensor], new: int
) -> list[Continuation]:
    """The continuations of each prompt by the dense and by the pruned model.

    Each model writes the most likely token at every step.

    Args:
        models: the dense model and the pruned one, of transformers.
        prompts: the token ids of each prompt (tokens,).
    """

    def text(tokens: Tensor) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    results = []
    for prompt in prompts:
        texts = []
        for model in models:
            inputs = prompt[None].to(next(model.parameters()).device)
            with eval_mode(model):
                output = model.generate(
                    inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=new,
                    do_sample=False, pad_token_id=0,
                )  # fmt: skip
            texts.append(text(output[0, len(prompt) :]))
        results.append(Continuation(text(prompt), *texts))
    return results
