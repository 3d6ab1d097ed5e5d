"""Sums over the gradients and the inputs of a model, for the losses of `apt.fit.losses`."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Adapter
from apt.adapter.recording import eval_mode
from apt.fit.outer import Outer, empty_outer, outer_modules
from apt.planning.plan import Plan
from apt.text.language_model import language_model

TOKENS, _SAMPLE = 4096, 512
"""The calibration tokens for the losses, and the tokens of a sample whose gradient is taken."""


@dataclass
class Sensitivities:
    """Sums over the gradients of the samples.

    Attributes:
        rows: for each weight in a block, the sum of the squared gradients of each row: (out,), or
            (experts, out) for a stack.
        outer: the sums for the embedding and the head.
        tokens: the token ids (samples, seqlen).
    """

    rows: dict[str, Tensor]
    outer: Outer
    tokens: Tensor


def sensitivities(
    model: nn.Module,
    adapter: Adapter,
    plan: Plan,
    tokens: Tensor,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> Sensitivities:
    """The sums over the gradients of the log-likelihoods of tokens that the model draws.

    The whole model must be in memory.

    Args:
        tokens: token ids (samples, seqlen), of which about `TOKENS` are used.
        step: called with the number of finished samples, and of all samples.
    """
    tokens = _first_tokens(tokens)
    sites = {
        f"{block.name}.{planned.site.parameter}": planned.site
        for block in plan.blocks
        for planned in block.sites
    }
    weights = {name: model.get_parameter(name) for name in sites}
    result = Sensitivities({name: torch.zeros(()) for name in weights}, empty_outer(model), tokens)
    draw, device = torch.Generator().manual_seed(0), next(model.parameters()).device
    reader = language_model(model)
    with eval_mode(model), adapter.running(model), _differentiable(model, weights.values()):
        for index, sample in enumerate(tokens, 1):
            with torch.enable_grad(), _watched(model, result.outer) as watched:
                logits = reader(input_ids=sample[None].to(device), use_cache=False).logits[0]
                probabilities = _add_logits(logits.detach(), watched, result.outer)
                labels = torch.multinomial(probabilities.cpu(), 1, generator=draw)[:, 0].to(device)
                loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
                variables = [*weights.values(), *watched.embedded]
                gradients = torch.autograd.grad(loss, variables, allow_unused=True)
            for (name, site), gradient in zip(sites.items(), gradients, strict=False):
                if gradient is not None:
                    squares = gradient.float().square_().sum(-2 if site.transposed else -1)
                    result.rows[name] = result.rows[name] + squares
            for gradient in gradients[len(weights) :]:
                if gradient is not None:
                    rows = gradient.float().flatten(0, -2)
                    result.outer.gradients += rows.T @ rows
            _count(sample, result.outer)
            step(index, len(tokens))
    return result


def forward_sums(model: nn.Module, adapter: Adapter, tokens: Tensor, gradient: float) -> Outer:
    """The sums for the embedding and the head from forwards alone.

    The gradients after the embedding are taken as uncorrelated, with this mean square.
    """
    tokens, outer = _first_tokens(tokens), empty_outer(model)
    reader, device = language_model(model), next(model.parameters()).device
    with (
        torch.no_grad(), eval_mode(model), adapter.running(model), _watched(model, outer) as watched
    ):  # fmt: skip
        for sample in tokens:
            logits = reader(input_ids=sample[None].to(device), use_cache=False).logits[0]
            _add_logits(logits, watched, outer)
            _count(sample, outer)
    outer.gradients += gradient * outer.tokens * torch.eye(len(outer.gradients), device=device)
    return outer


def _first_tokens(tokens: Tensor) -> Tensor:
    """About `TOKENS` of the tokens (samples, seqlen)."""
    tokens = tokens[:, :_SAMPLE]
    return tokens[: max(1, TOKENS // tokens.shape[1])]


def _count(sample: Tensor, outer: Outer) -> None:
    """Add the tokens (seqlen,) of a sample."""
    counts = torch.bincount(sample, minlength=len(outer.counts))
    outer.counts += counts.to(outer.counts)[: len(outer.counts)]
    outer.tokens += len(sample)


@contextmanager
def _differentiable(model: nn.Module, weights: Iterable[Tensor]) -> Iterator[None]:
    """Inside the context, only these weights have gradients."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


@dataclass
class _Watched:
    """What the forwards of a model have passed.

    Attributes:
        embedded: the outputs of the embedding, as variables, so that they have gradients.
        products: the norm of the last products of the head.
    """

    embedded: list[Tensor] = field(default_factory=list)
    products: float = 0.0


@contextmanager
def _watched(model: nn.Module, outer: Outer) -> Iterator[_Watched]:
    """Inside the context, the inputs of the head are summed, and the embedding is watched."""
    embedding, head = outer_modules(model)
    watched = _Watched()

    def listed(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert embedding is not None
        rows = nn.functional.embedding(inputs[0], embedding.weight.detach())
        outer.embedding_scale = _ratio(output, rows)
        watched.embedded.append(output.detach().requires_grad_())
        return watched.embedded[-1]

    def summed(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].detach().float().flatten(0, -2)
        outer.hidden += rows.T @ rows

    def kept(module: nn.Module, inputs: Any, output: Tensor) -> None:
        watched.products = float(output.detach().float().norm())

    hooks = [] if embedding is None else [embedding.register_forward_hook(listed)]
    if head is not None:
        hooks += [head.register_forward_pre_hook(summed), head.register_forward_hook(kept)]
    try:
        yield watched
    finally:
        for hook in hooks:
            hook.remove()


def _ratio(output: Tensor, rows: Tensor) -> float:
    """The norm of an output relative to that of its rows; 1 without rows."""
    norm = float(rows.float().norm())
    return float(output.detach().float().norm()) / norm if norm else 1.0


def _add_logits(logits: Tensor, watched: _Watched, outer: Outer) -> Tensor:
    """The probabilities of logits (tokens, vocabulary); their variances are added up."""
    probabilities = logits.float().softmax(-1)
    if outer.head is not None:
        norm = float(logits.float().norm())
        outer.logit_scale = norm / watched.products if watched.products else 1.0
        outer.variances += (probabilities * (1 - probabilities)).sum(0)[: len(outer.variances)]
    return probabilities
