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

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Site
from apt.adapter.recording import eval_mode
from apt.calibration.batches import enter
from apt.calibration.capture import grams_of
from apt.fit.levels import Level
from apt.fit.outer import Outer, damped
from apt.fit.sampled import SampledLevel, sampled_levels
from apt.fit.sensitivities import Sensitivities
from apt.fit.table import MeasuredLevel
from apt.patterns import Pattern
from apt.planning.plan import Plan
from apt.solver import Gram

Prune = Callable[[Tensor, Gram, Pattern], Tensor]
"""A function from a weight (out, in), its Gram matrix and a pattern to the pruned weight."""

Levels = Mapping[str, Sequence[Level]]
"""The levels of each tensor, by the name of its parameter."""

_ROWS = 64  # rows of a weight whose losses are computed; the other rows are like them
_OUTER_ROWS = 1024  # the same for the embedding and the head
_EXPERTS = 4  # the experts of a stack whose losses are computed


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
    found, seen = [SampledLevel() for _ in levels], 0.0
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
        measured = sampled_levels(pruned, damped(matrix), terms, held, levels)
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
        levels,
        sampled_levels(lambda pattern: sample, outer.matrix(name), terms, terms, levels),
        1.0,
    )


def _with_losses(
    levels: Sequence[Level], found: Sequence[SampledLevel], scale: float
) -> tuple[MeasuredLevel, ...]:
    return tuple(
        MeasuredLevel(level.name, level.size_with(sums.share), sums.loss * scale, sums.share)
        for level, sums in zip(levels, found, strict=True)
    )


def _spaced(count: int, most: int) -> Tensor:
    """At most ``most`` evenly spaced indices below ``count``."""
    return torch.linspace(0, count - 1, min(count, most)).long()
