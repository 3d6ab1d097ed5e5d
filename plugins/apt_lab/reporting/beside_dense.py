"""A pruned model beside the dense one: losses of frequent and rare tokens, and generated text."""

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
        label: how often they occur.
        share: their share of the predicted tokens.
        dense, pruned: the mean loss of each model on them, in nats.
    """

    label: str
    share: float
    dense: float
    pruned: float


@dataclass(frozen=True)
class Continuation:
    """The beginning of a text, and what both models write after it."""

    prompt: str
    dense: str
    pruned: str


@torch.no_grad()
def token_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """The loss of each predicted token (windows, seqlen − 1), in nats.

    Args:
        tokens: token ids (windows, seqlen).
    """
    device, found = next(model.parameters()).device, []
    with eval_mode(model):
        for batch in torch.split(tokens, windows_at_once(tokens.shape[1])):
            following = batch.to(device)[:, 1:]
            losses, place = [], 0
            for logits in parts_of_logits(model, batch.to(device)):
                targets = following[:, place : place + logits.shape[1], None]
                place += logits.shape[1]
                logs = logits[:, : targets.shape[1]].float().log_softmax(-1)
                losses.append(-logs.gather(2, targets).squeeze(2).cpu())
            found.append(torch.cat(losses, 1))
    return torch.cat(found)


def by_frequency(tokens: Tensor, dense: Tensor, pruned: Tensor) -> list[FrequencyGroup]:
    """The mean losses of both models by how often a token occurs in the text.

    Args:
        tokens: token ids (windows, seqlen).
        dense, pruned: the losses of both models, see `token_losses`.
    """
    counts = torch.bincount(tokens.flatten())[tokens[:, 1:]]
    groups, low = list[FrequencyGroup](), 0
    for high in (*_EDGES, int(counts.max())):
        chosen = (counts > low) & (counts <= high)
        if chosen.any():
            groups.append(
                FrequencyGroup(
                    _label(low + 1, high),
                    float(chosen.double().mean()),
                    float(dense[chosen].double().mean()),
                    float(pruned[chosen].double().mean()),
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
    """What the dense and the pruned model write after each prompt.

    They write the most likely token each time.

    Args:
        models: the dense model and the pruned one, of transformers.
        prompts: the token ids of each prompt (tokens,).
    """

    def text(tokens: Tensor) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    found = []
    for prompt in prompts:
        texts = []
        for model in models:
            given = prompt[None].to(next(model.parameters()).device)
            with eval_mode(model):
                made = model.generate(
                    given, attention_mask=torch.ones_like(given), max_new_tokens=new,
                    do_sample=False, pad_token_id=0,
                )  # fmt: skip
            texts.append(text(made[0, len(prompt) :]))
        found.append(Continuation(text(prompt), *texts))
    return found
