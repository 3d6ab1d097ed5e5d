"""Dead inputs, which were zero on all calibration tokens: their weights are pruned first.

A dead input changes no output on the calibration text, so pruning its weights costs nothing. A
method that ranks all weights together keeps some weights of dead inputs, and prunes weights of live
inputs instead. Therefore the method solves the live inputs alone, for the rest of the count. For
n:m it gets zeros as the weights of dead inputs.
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

    The method gets the unchanged layer in three cases: there are no dead inputs, the pattern prunes
    groups of columns, or the pattern does not allow leaving out single inputs. If the pattern
    prunes fewer weights than the dead inputs have, their smallest weights are pruned.

    Args:
        method: the method.
        weight: the dense ``W`` (out, in).
        gram: the Gram matrix of its inputs.
        pattern: the pattern.
        options: the options of the method.

    Raises:
        MethodError: the method returns no solution for its weight.
    """

    def solve_checked(weight: Tensor, gram: Gram, pattern: SitePattern) -> Solution:
        solution = method(weight, gram, pattern, options)
        check_solution(solution, weight)
        return solution

    dead = gram.dead
    if pattern.structured or not bool(dead.any()) or bool(dead.all()):
        return solve_checked(weight, gram, pattern)
    sparse = cast(Pattern, pattern)
    ranks = weight.abs().masked_fill(~dead, torch.inf)
    if sparse.group:
        return _with_zeros(solve_checked, weight, gram, sparse, sparse.smallest(ranks) & dead)
    live_pattern = sparse.rest((len(weight), len(dead)), int(dead.sum()))
    if live_pattern is sparse:
        return solve_checked(weight, gram, pattern)
    pruned_first = sparse.smallest(ranks)
    if live_pattern is None:  # the method has nothing to choose
        return Solution(weight.masked_fill(pruned_first, 0), pruned_first)
    live_solution = solve_checked(weight[:, ~dead], gram.live, live_pattern)
    pruned, mask = torch.zeros_like(weight), torch.ones_like(pruned_first)
    pruned[:, ~dead], mask[:, ~dead] = live_solution.weight, live_solution.mask
    return replace(live_solution, weight=pruned, mask=mask)


def _with_zeros(
    solve_checked: Callable[..., Solution],
    weight: Tensor,
    gram: Gram,
    pattern: Pattern,
    pruned_first: Tensor,
) -> Solution:
    """Solve a layer for n:m, with zeros at ``pruned_first`` (out, in), which scores rank lowest.

    If a method keeps such a zero, it has pruned a live weight of the same group. Then the largest
    of these live weights are kept instead, with their dense values.
    """
    solution = solve_checked(weight.masked_fill(pruned_first, 0), gram, pattern)
    counts, needed = pattern.zero_counts(solution.mask)
    if bool((counts != needed).any()) or not bool((pruned_first & ~solution.mask).any()):
        return solution
    ranks = weight.abs().masked_fill(~solution.mask, torch.inf).masked_fill(pruned_first, -1)
    mask = pattern.smallest(ranks)
    kept = torch.where(solution.mask, weight, solution.weight)
    return replace(solution, weight=kept.masked_fill(mask, 0), mask=mask)
