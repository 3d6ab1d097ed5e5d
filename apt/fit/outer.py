"""The embedding and the head of a model: their weights, and the terms of their losses."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

DAMPING = 0.01
"""The damping of the matrices with which tensors outside the blocks are rounded."""


@dataclass
class Outer:
    """The embedding and the head of a model, with sums over the tokens.

    Attributes:
        embedding, head: the names of their weights: the same name for tied weights; None without a
            module of this kind.
        counts: the number of tokens of each row of the embedding.
        gradients: the sum of ``g gᵀ`` (hidden, hidden), with the gradients g after the embedding.
        variances: the sum of ``p (1 − p)`` for each row of the head.
        hidden: the Gram matrix (hidden, hidden) of the inputs of the head.
        tokens: the number of tokens.
        embedding_scale: the factor by which the embedding multiplies its rows, as in Gemma 3.
        logit_scale: the factor between the products of the head and the logits, as in Granite.
    """

    embedding: str | None
    head: str | None
    counts: Tensor
    gradients: Tensor
    variances: Tensor
    hidden: Tensor
    tokens: int = 0
    embedding_scale: float = 1.0
    logit_scale: float = 1.0

    @property
    def names(self) -> list[str]:
        """The names of the weights."""
        return list(dict.fromkeys(name for name in (self.embedding, self.head) if name))

    def terms(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """The pairs of b (rows,) and G (hidden, hidden) of the loss of a weight."""
        terms = []
        if name == self.embedding:
            smoothed = self.counts + 0.5  # rows without a token here have some in other text
            scale = self.embedding_scale**2 / self.tokens
            terms.append((smoothed / smoothed.sum(), self.gradients * scale))
        if name == self.head:
            scale = self.logit_scale**2 / self.tokens
            terms.append((self.variances * scale, self.hidden / self.tokens))
        return terms

    @property
    def gradient(self) -> float:
        """The mean square of a gradient after the embedding, for each token."""
        width = len(self.gradients)
        return float(self.gradients.diagonal().sum()) / self.tokens / width if width else 0.0

    def matrix(self, name: str) -> Tensor:
        """The damped matrix H (hidden, hidden) for the rounding of a weight, for a mean row."""
        return damped(sum((rows.mean() * gram for rows, gram in self.terms(name)), torch.zeros(())))


def outer_modules(model: nn.Module) -> tuple[nn.Embedding | None, nn.Linear | None]:
    """The embedding and the head; None for a model without one, or with one of another kind."""
    found = [getattr(model, f"get_{which}_embeddings")() for which in ("input", "output")]
    embedding, head = found
    return (
        embedding if isinstance(embedding, nn.Embedding) else None,
        head if isinstance(head, nn.Linear) else None,
    )


def outer_names(model: nn.Module) -> list[str]:
    """The names of the weights of the embedding and the head, of the kinds that can be rounded."""
    return empty_outer(model).names


def empty_outer(model: nn.Module) -> Outer:
    """The sums over no token."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    embedding, head = outer_modules(model)
    first, last = (None if m is None else m.weight for m in (embedding, head))

    def zeros(weight: Tensor | None, *dims: int) -> Tensor:
        shape = [0 if weight is None else weight.shape[dim] for dim in dims]
        return torch.zeros(shape, device=None if weight is None else weight.device)

    return Outer(
        None if first is None else names.get(id(first)),
        None if last is None else names.get(id(last)),
        zeros(first, 0), zeros(first, 1, 1), zeros(last, 0), zeros(last, 1, 1),
    )  # fmt: skip


def damped(matrix: Tensor) -> Tensor:
    """A matrix with `DAMPING` times its mean diagonal, or 1, on its diagonal."""
    more = DAMPING * float(matrix.diagonal().mean()) or 1.0
    return matrix + more * torch.eye(len(matrix), device=matrix.device)
