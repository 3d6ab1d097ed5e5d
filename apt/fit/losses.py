"""The loss of the model for each level of each tensor, from one pass over the dense model.

To second order, a change ``D`` of one weight raises the divergence of the model's next token from
the dense model by ``½ E[(gᵀ D x)²]`` per token. Here x is the input of the weight, and g the
gradient of the log-likelihood of a token that is drawn from the model (the Fisher information). The
gradient of the weight over a sample is ``Σ g xᵀ``. The labels of the tokens are drawn
independently, and products of different tokens are neglected. So the expected square of its norm in
row i is ``Σ g_i² ‖x‖²``. This gives the mean ``b_i`` of ``g_i²`` without hooks into products, and
with the Gram matrix G of the inputs::

    loss(D) = ½ Σ_i b_i (D G Dᵀ)_ii

An embedding has the frequencies of its tokens in place of ``b``, and the Gram matrix of the
gradients after it in place of G. For a head, ``b_v`` is the variance ``p_v (1 − p_v)`` of its
token, which needs no sampling. An embedding that is the head too has the sum of both losses.

For a level with zeros, a method of APT finds the zeros and the kept weights V of the sampled rows.
Kept weights are at their optimum, so that the losses of the zeros and of the rounding of V add up.
V is fitted to the tokens, unlike rounded weights. So the loss of the zeros is measured on other
tokens than those of the solve: on the second half of the samples.

The change D of a rounding is that of the nearest points. The error feedback of the rounding lowers
the loss, in some tensors more than in others (`rounded`). The share that is left is measured at one
level of each tensor. So the losses are comparable between grids of any kind, and between tensors.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Site
from apt.adapter.recording import eval_mode
from apt.calibration.batches import enter
from apt.calibration.capture import grams_of
from apt.fit.levels import Level
from apt.fit.table import MeasuredLevel
from apt.patterns import Grid, Pattern, Points
from apt.planning.plan import Plan
from apt.solver import Gram, rounded

Prune = Callable[[Tensor, Gram, Pattern], Tensor]
"""A function from a weight (out, in), its Gram matrix and a pattern to the pruned weight."""

Levels = Mapping[str, Sequence[Level]]
"""The levels of each tensor, by the name of its parameter."""

TOKENS, _SAMPLE = 4096, 512
"""The calibration tokens for the losses, and the tokens of a sample whose gradient is taken."""

DAMPING = 0.01
"""The damping of the matrices with which tensors outside the blocks are rounded."""

_ROWS = 64  # rows of a weight whose losses are computed; the other rows are like them
_OUTER_ROWS = 1024  # the same for the embedding and the head
_EXPERTS = 4  # the experts of a stack whose losses are computed


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
        return _damped(
            sum((rows.mean() * gram for rows, gram in self.terms(name)), torch.zeros(()))
        )


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
    result = Sensitivities({name: torch.zeros(()) for name in weights}, _empty_outer(model), tokens)
    draw, device = torch.Generator().manual_seed(0), next(model.parameters()).device
    with eval_mode(model), adapter.running(model), _differentiable(model, weights.values()):
        for index, sample in enumerate(tokens, 1):
            with torch.enable_grad(), _watched(model, result.outer) as watched:
                logits = model(input_ids=sample[None].to(device), use_cache=False).logits[0]
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
    tokens, outer = _first_tokens(tokens), _empty_outer(model)
    device = next(model.parameters()).device
    with (
        torch.no_grad(), eval_mode(model), adapter.running(model), _watched(model, outer) as watched
    ):  # fmt: skip
        for sample in tokens:
            logits = model(input_ids=sample[None].to(device), use_cache=False).logits[0]
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


def _modules(model: nn.Module) -> tuple[nn.Embedding | None, nn.Linear | None]:
    """The embedding and the head; None for a model without one, or with one of another kind."""
    found = [getattr(model, f"get_{which}_embeddings")() for which in ("input", "output")]
    embedding, head = found
    return (
        embedding if isinstance(embedding, nn.Embedding) else None,
        head if isinstance(head, nn.Linear) else None,
    )


def outer_names(model: nn.Module) -> list[str]:
    """The names of the weights of the embedding and the head, of the kinds that can be rounded."""
    return _empty_outer(model).names


def _empty_outer(model: nn.Module) -> Outer:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    embedding, head = _modules(model)
    first, last = (None if m is None else m.weight for m in (embedding, head))

    def zeros(weight: Tensor | None, *dims: int) -> Tensor:
        shape = [0 if weight is None else weight.shape[dim] for dim in dims]
        return torch.zeros(shape, device=None if weight is None else weight.device)

    return Outer(
        None if first is None else names.get(id(first)),
        None if last is None else names.get(id(last)),
        zeros(first, 0), zeros(first, 1, 1), zeros(last, 0), zeros(last, 1, 1),
    )  # fmt: skip


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
    embedding, head = _modules(model)
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


def measured_levels(
    model: nn.Module,
    adapter: Adapter,
    plan: Plan,
    given: Sensitivities,
    levels: Levels,
    step: Callable[[int, int], None] = lambda done, total: None,
    prune: Prune | None = None,
) -> dict[str, tuple[MeasuredLevel, ...]]:
    """The loss of each level of each tensor, by the name of its parameter.

    Args:
        prune: finds the weights of levels with zeros; None if there are no such levels.
        step: called with the number of finished blocks, and of all blocks.

    Raises:
        KeyError: a tensor of ``levels`` is neither a weight of a site, nor the embedding or the
            head.
    """
    result = dict[str, tuple[MeasuredLevel, ...]]()
    for name in given.outer.names:
        if name in levels:
            weight = model.get_parameter(name).detach()
            result[name] = _outer_losses(weight, given.outer, name, levels[name])
    modules = dict(adapter.blocks(model))
    with eval_mode(model), adapter.running(model):
        has_zeros = any(level.pattern for name in levels for level in levels[name])
        samples = given.tokens.tensor_split(2) if has_zeros else (given.tokens,)
        parts = [enter(adapter, model, each) for each in samples if len(each)]
        for index, planned in enumerate(plan.blocks):
            block = modules[planned.name]
            sites = dict[str, list[Site]]()
            for entry in planned.sites:
                sites.setdefault(f"{planned.name}.{entry.site.parameter}", []).append(entry.site)
            wanted = {name: members for name, members in sites.items() if name in levels}
            every = [site for members in wanted.values() for site in members]
            grams = [grams_of(adapter, block, index, every, part) for part in parts]
            for name, members in wanted.items():
                rows, count = given.rows[name], given.tokens.numel()
                result[name] = _site_losses(block, members, rows, grams, count, levels[name], prune)
            step(index + 1, len(plan.blocks))
    return {name: result[name] for name in levels}


def _site_losses(
    block: nn.Module,
    sites: Sequence[Site],
    squares: Tensor,
    grams: Sequence[Mapping[str, Gram]],
    tokens: int,
    levels: Sequence[Level],
    prune: Prune | None,
) -> tuple[MeasuredLevel, ...]:
    """The losses of the levels of a parameter, from some rows, and some experts of a stack.

    Args:
        squares: the sum of squared gradients of each row, (out,) or (experts, out).
        grams: the Gram matrices of each part of the tokens.
    """
    total = float(squares.sum())
    chosen = sites[:: max(1, len(sites) // _EXPERTS)]
    found, seen = [_Sampled() for _ in levels], 0.0
    for site in chosen:
        inputs = _Inputs([part[site.input] for part in grams])
        if not squares.ndim:  # the weight has no gradient, as an expert without tokens
            break
        of_site = squares if site.expert is None else squares[site.expert]
        weight = site.oriented(site.weight(block).detach())
        rows = _spaced(len(weight), _ROWS).to(weight.device)
        weight, importance = weight[rows].float(), of_site[rows]
        if not inputs.energy or not float(importance.sum()):
            continue
        seen += float(importance.sum())
        weighting, matrix = importance / inputs.energy / tokens / 2, inputs.matrix
        pruned = partial(_pruned, weight, inputs.solved, prune)
        terms, held = [(weighting, matrix)], [(weighting, inputs.held)]
        measured = _sampled(pruned, _damped(matrix), terms, held, levels)
        for sums, each in zip(found, measured, strict=True):
            sums.add(each)
    scale = total / seen if seen else 0.0
    return _with_losses(levels, found, scale)


class _Inputs:
    """The inputs of a site, in one or two parts.

    Attributes:
        matrix: the Gram matrix of all tokens.
        energy: the sum of their squares.
        solved: the Gram matrix of the part for the solves.
        held: the Gram matrix of the other part, with the energy of all tokens.
    """

    def __init__(self, parts: Sequence[Gram]) -> None:
        self.matrix = sum((part.matrix for part in parts[1:]), parts[0].matrix)
        self.energy = _energy(self.matrix)
        live = [part for part in parts if _energy(part.matrix)] or parts
        self.solved, held = live[0], live[-1].matrix
        self.held = held * (self.energy / _energy(held)) if len(live) > 1 else self.matrix


def _energy(matrix: Tensor) -> float:
    return float(matrix.diagonal().sum())


def _pruned(weight: Tensor, gram: Gram, prune: Prune | None, pattern: Pattern | None) -> Tensor:
    """The weight (out, in) with the zeros of a pattern; the weight itself for None."""
    if pattern is None:
        return weight
    if prune is None:
        raise ValueError(f"no function prunes to {pattern}")
    return prune(weight.clone(), gram, pattern)


def _outer_losses(
    weight: Tensor, outer: Outer, name: str, levels: Sequence[Level]
) -> tuple[MeasuredLevel, ...]:
    """The losses of the levels of the embedding or the head, from some rows."""
    rows = _spaced(len(weight), _OUTER_ROWS).to(weight.device)
    terms = [
        (part[rows] * part.sum() / part[rows].sum() / 2, gram) for part, gram in outer.terms(name)
    ]
    sample = weight[rows].float()
    return _with_losses(
        levels, _sampled(lambda pattern: sample, outer.matrix(name), terms, terms, levels), 1.0
    )


_Form = tuple[Pattern | None, Grid | None]
_Terms = Sequence[tuple[Tensor, Tensor]]


@dataclass
class _Sampled:
    """A level, measured on some rows of one or several weights.

    Attributes:
        loss: the sum of their losses.
        zeros, weights: the sums of their zeros and of all their weights.
    """

    loss: float = 0.0
    zeros: int = 0
    weights: int = 0

    @property
    def share(self) -> float:
        """The share of zeros."""
        return self.zeros / max(self.weights, 1)

    def add(self, other: "_Sampled") -> None:
        """Add the sums of other weights."""
        self.loss += other.loss
        self.zeros += other.zeros
        self.weights += other.weights


def _sampled(
    pruned: Callable[[Pattern | None], Tensor],
    matrix: Tensor,
    terms: _Terms,
    held: _Terms,
    levels: Sequence[Level],
) -> list[_Sampled]:
    """The measured levels of a weight (out, in).

    Args:
        pruned: the weight with the zeros of a pattern; for None, the weight itself.
        matrix: the matrix H (in, in) of the rounding.
        terms: the pairs of b (out,) and G (in, in), with all factors.
        held: the same of other tokens than those to which the zeros are fitted.
    """

    def loss(change: Tensor, terms: _Terms = terms) -> float:
        return sum(float((((change @ g) * change).sum(1) * b).sum()) for b, g in terms)

    weights = {pattern: pruned(pattern) for pattern in (None, *(x.pattern for x in levels))}
    removal = {pattern: loss(kept - weights[None], held) for pattern, kept in weights.items()}
    forms: list[_Form] = [(level.pattern, level.grid) for level in levels]
    found: dict[_Form, Points] = {
        (pattern, grid): grid.points(weights[pattern], matrix.diagonal(), torch.float32)
        for pattern, grid in forms
        if grid
    }
    nearest = {form: points.rounded(weights[form[0]]) for form, points in found.items()}
    plain = {form: loss(values - weights[form[0]]) for form, values in nearest.items()}
    # The loss of the grid in the middle: the share at very small losses is lost in rounding.
    middle = sorted(plain, key=lambda form: plain[form])[len(plain) // 2] if plain else (None, None)
    kept, grid, share = weights[middle[0]], middle[1], 1.0
    if grid is not None and plain[middle] > 0:
        share = loss(rounded(kept, matrix, grid, passes=1).weight - kept) / plain[middle]
    return [
        _Sampled(
            removal[form[0]] + plain.get(form, 0.0) * share,
            int((nearest.get(form, weights[form[0]]) == 0).sum()),
            weights[None].numel(),
        )
        for form in forms
    ]


def _with_losses(
    levels: Sequence[Level], found: Sequence[_Sampled], scale: float
) -> tuple[MeasuredLevel, ...]:
    return tuple(
        MeasuredLevel(level.name, level.size_with(sums.share), sums.loss * scale)
        for level, sums in zip(levels, found, strict=True)
    )


def _spaced(count: int, most: int) -> Tensor:
    """At most ``most`` evenly spaced indices below ``count``."""
    return torch.linspace(0, count - 1, min(count, most)).long()


def _damped(matrix: Tensor) -> Tensor:
    """A matrix with `DAMPING` times its mean diagonal, or 1, on its diagonal."""
    more = DAMPING * float(matrix.diagonal().mean()) or 1.0
    return matrix + more * torch.eye(len(matrix), device=matrix.device)
