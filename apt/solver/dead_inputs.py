"""Inputs that were zero on all calibration tokens: their weights are the first to go.

The weights of such a dead input change no output on the calibration text, and no other weight can
make up for them or profit from them. A method that ranked them among the others would keep some of
them and prune weights that count. Here every method solves the live inputs alone, for what is left
of the count.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from apt.solver.column_groups import ColumnGroups
from apt.solver.gram import Gram
from apt.solver.options import Solution, SolverOptions
from apt.solver.patterns import NM, Pattern, SitePattern, Unstructured, lowest

Solve = Callable[[Tensor, Gram, Pattern, SolverOptions], Solution]


def solve_live(
    method: Callable[..., Solution],
    weight: Tensor,
    gram: Gram,
    pattern: SitePattern,
    options: SolverOptions,
) -> Solution:
    """Solve a layer; weights of dead inputs are pruned first, and the count stays exact.

    Without dead inputs, and for groups of columns, the method gets the layer as it is. If the
    pattern removes fewer weights than the dead inputs have, the smallest of these go.

    Args:
        method: the method.
        weight: the dense ``W`` (out, in).
        gram: the Gram matrix of its inputs.
        pattern: the pattern.
        options: the options of the method.
    """
    dead = gram.dead
    if isinstance(pattern, ColumnGroups) or not bool(dead.any()) or bool(dead.all()):
        return method(weight, gram, pattern, options)
    first = lowest(weight.abs().masked_fill(~dead, torch.inf), pattern)
    if isinstance(pattern, NM):
        return _with_first(method, weight, gram, pattern, options, first & dead)
    return _live_part(method, weight, gram, pattern, options, first)


def _live_part(
    method: Solve,
    weight: Tensor,
    gram: Gram,
    pattern: Unstructured,
    options: SolverOptions,
    first: Tensor,
) -> Solution:
    """All weights of dead inputs go, and those of live inputs that the method chooses.

    Args:
        method, weight, gram, pattern, options: as in `solve_live`.
        first: a mask (out, in) that meets the pattern with as few weights of live inputs as it can.
    """
    dead = gram.dead
    rows = 1 if pattern.per == "row" else len(weight)
    count = pattern.count(rows * len(dead)) - rows * int(dead.sum())
    live = rows * int((~dead).sum())
    if not 0 < count < live:  # nothing is left to choose
        return Solution(weight.masked_fill(first, 0), first)
    rest = replace(pattern, sparsity=count / live)
    part = method(weight[:, ~dead], gram.live, rest, options)
    pruned, mask = torch.zeros_like(weight), torch.ones_like(first)
    pruned[:, ~dead], mask[:, ~dead] = part.weight, part.mask
    return replace(part, weight=pruned, mask=mask)


def _with_first(
    method: Solve,
    weight: Tensor,
    gram: Gram,
    pattern: NM,
    options: SolverOptions,
    first: Tensor,
) -> Solution:
    """n:m with the weights ``first`` (out, in) pruned: the method sees zeros there.

    Every score ranks a zero lowest. If a method keeps some all the same, they go in place of
    the weights of least magnitude... that it pruned in their group, which stay dense.
    """
    found = method(weight.masked_fill(first, 0), gram, pattern, options)
    if not bool((first & ~found.mask).any()):
        return found
    scores = weight.abs().masked_fill(~found.mask, torch.inf).masked_fill(first, -1)
    mask = lowest(scores, pattern)
    kept = torch.where(found.mask, weight, found.weight)
    return replace(found, weight=kept.masked_fill(mask, 0), mask=mask)
