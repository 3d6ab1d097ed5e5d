"""What a training is measured by on samples held back.

A kind of recovery without a loss of its own minimises the same.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Sample
from apt.recovery.log_probabilities import log_probabilities
from apt.text.language_model import language_model

Batch = Mapping[str, Any]
"""The samples that run together, see `apt.extending.Trainable`."""

Loss = Callable[[nn.Module, Batch], Tensor]
"""The loss of a model on a batch, see `apt.extending.Trainable`."""


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss of the next token."""
    tokens = batch["input_ids"]
    logits = language_model(model)(input_ids=tokens, use_cache=False).logits
    next_tokens = tokens.roll(-1, dims=1)[..., None]  # the last one of a sample is not known
    return -log_probabilities(logits, next_tokens)[:, :-1].mean()


def _windows(samples: Sequence[Tensor]) -> Batch:
    """A batch of windows of text."""
    return {"input_ids": torch.stack([*samples])}


@dataclass(frozen=True)
class Objective:
    """A loss to be measured, and the batches that it takes; by default that of windows of text.

    Attributes:
        loss: the mean loss over the samples of a batch.
        stack: makes a batch of windows (seqlen,), or of other samples.
        dense: True if ``loss`` runs the dense model.
    """

    loss: Loss = next_token_loss
    stack: Callable[[Sequence[Any]], Batch] = _windows
    dense: bool = False

    def collate(self, items: Sequence[tuple[int, Tensor | Sample]]) -> dict[str, Any]:
        """The batch of samples with their indices in the text."""
        rows = torch.tensor([row for row, _ in items])
        return {"row": rows, **self.stack([sample for _, sample in items])}
