"""Inputs that were zero on all calibration tokens: their weights are the first to go.

Such a dead input changes no output on the calibration text, so its weights cost nothing. A method
that ranks them among the others keeps some of them, and prunes weights that count in their place.
Therefore the method solves the live inputs alone, for the rest of the count. For n:m it sees zeros.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from apt.patterns import Pattern, SitePattern
from apt.solver.gram import Gram
from apt.solver.options import Solution, SolverOptions, check_solution


def solve_live(
    method: Callable[..., Solution],
    weight: Tensor,
    gram: Gram,
    pattern: SitePattern,
    options: SolverOptions,
) -> Solution:
    """Solve a layer so that the weights of dead inputs are pruned first; the count stays exact.

    Without dead inputs, for groups of columns, and for a pattern that single inputs cannot be left
    out of, the method gets the layer as it is. If the pattern prunes fewer weights than the dead
    inputs have, the smallest of these are pruned.

    Args:
        method: the method.
        weight: the dense ``W`` (out, in).
        gram: the Gram matrix of its inputs.
        pattern: the pattern.
        options: the options of the method.

    Raises:
        MethodError: the method returns no solution of the weight that it got.
    """

    def solved(weight: Tensor, gram: Gram, pattern: SitePattern) -> Solution:
        solution = method(weight, gram, pattern, options)
        check_solution(solution, weight)
        return solution

    dead = gram.dead
    if pattern.structured or not bool(dead.any()) or bool(dead.all()):
        return solved(weight, gram, pattern)
    sparse = cast(Pattern, pattern)
    ranks = weight.abs().masked_fill(~dead, torch.inf)
    if sparse.group:
        return _with_zeros(solved, weight, gram, sparse, sparse.smallest(ranks) & dead)
    rest = sparse.rest((len(weight), len(dead)), int(dead.sum()))
    if rest is sparse:
        return solved(weight, gram, pattern)
    first = sparse.smallest(ranks)
    if rest is None:  # the method has nothing to choose
        return Solution(weight.masked_fill(first, 0), first)
    part = solved(weight[:, ~dead], gram.live, rest)
    pruned, mask = torch.zeros_like(weight), torch.ones_like(first)
    pruned[:, ~dead], mask[:, ~dead] = part.weight, part.mask
    return replace(part, weight=pruned, mask=mask)


def _with_zeros(
    solved: Callable[..., Solution], weight: Tensor, gram: Gram, pattern: Pattern, first: Tensor
) -> Solution:
    """A layer solved for n:m with zeros at ``first`` (out, in), which every score ranks lowest.

    A method that keeps such a zero nevertheless has pruned a live weight of the same group. The
    largest of these are kept instead, as they were.
    """
    solution = solved(weight.masked_fill(first, 0), gram, pattern)
    counts, needed = pattern.zero_counts(solution.mask)
    if bool((counts != needed).any()) or not bool((first & ~solution.mask).any()):
        return solution
    ranks = weight.abs().masked_fill(~solution.mask, torch.inf).masked_fill(first, -1)
    mask = pattern.smallest(ranks)
    kept = torch.where(solution.mask, weight, solution.weight)
    return replace(solution, weight=kept.masked_fill(mask, 0), mask=mask)
