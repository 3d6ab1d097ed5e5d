"""DSnoT: a mask refined by growing and pruning, without an update of weights (arXiv 2310.08915).

Let ``x̄`` be the mean of an input, summed over one calibration sample. The expected error of a row
is ``ε = Σ w_j x̄_j`` over its pruned weights. In each cycle a row keeps the pruned weight that
explains most of the error, relative to the variance of its input within a sample, and prunes a kept
weight of low Wanda score instead. A row is finished when ``|ε|`` is small.
"""

import math

import torch
from torch import Tensor

from apt.solver import Gram, Pattern, Solution, SolverOptions, joint_weights
from apt_plugins.baselines import wanda

CYCLES = 50
"""The greatest number of exchanges in a row of at least `WIDTH` inputs, as in the paper."""

WIDTH = 4096
"""The narrowest row in the paper. A narrower row has fewer exchanges, in proportion to its inputs.
On SmolLM2, with rows of 576 and 1,536 inputs, 50 exchanges would double the perplexity at 60 %."""

THRESHOLD = 0.1
"""The error of a row that needs no further exchange, as in the paper."""


@torch.no_grad()
def dsnot(weight: Tensor, gram: Gram, pattern: Pattern, options: SolverOptions) -> Solution:
    """Wanda's mask, refined; the kept weights stay as they are.

    Args:
        weight: the dense ``W`` (out, in).
        gram: the Gram matrix of the layer's inputs (in, in), with their sum.
        pattern: the pattern; an unstructured one without ``per`` is counted in each row.
        options: unused.
    """
    start = wanda(weight, gram, pattern, options).mask
    mask = refined(weight, gram, start, pattern.group)
    return Solution(weight.masked_fill(mask, 0), mask)


def dsnot_exact(weight: Tensor, gram: Gram, pattern: Pattern, options: SolverOptions) -> Solution:
    """The mask of `dsnot`, with exact least-squares weights for it (arXiv 2410.15567)."""
    mask = dsnot(weight, gram, pattern, options).mask
    damped = gram.damped(options.damping)
    joint = joint_weights(weight, damped, mask, None, options.tolerance)
    return Solution(joint.weight.to(weight.dtype), mask, damped.damping, joint.residual)


def refined(
    weight: Tensor, gram: Gram, mask: Tensor, group: int | None = None, cycles: int | None = None
) -> Tensor:
    """A refined mask; every row, or every group, keeps its number of pruned weights.

    The criteria are those of the authors' code. A weight is exchanged at most once. For n:m, the
    weight of lowest score in the group is pruned, and a row is finished when its error changes
    sign; otherwise the weight that is pruned must lower the error.

    Args:
        weight: the dense ``W`` (out, in).
        gram: the Gram matrix of the layer's inputs (in, in), with their sum.
        mask: the initial mask (out, in), True where pruned.
        group: the number of consecutive columns in a group; None if a row is a single group.
        cycles: the greatest number of exchanges in a row; see `CYCLES` and `WIDTH` by default.
    """
    if cycles is None:
        cycles = math.ceil(CYCLES * min(1.0, weight.shape[1] / WIDTH))
    rows = _Rows(weight.to(gram.total.dtype), gram, mask, group)
    for _ in range(cycles):
        if not rows.exchange():
            break
    return rows.mask


class _Rows:
    """The rows of a weight, and their masks in progress.

    Attributes:
        mask: the current mask (out, in), True where pruned.
    """

    def __init__(self, weight: Tensor, gram: Gram, mask: Tensor, group: int | None) -> None:
        tokens = max(gram.tokens, 1)
        mean, square = gram.total / tokens, gram.matrix.diagonal() / tokens
        variance = gram.variance.clamp_min(torch.finfo(mean.dtype).tiny)
        self.mask = mask.clone()
        self._group = group
        self._share = weight * (mean * gram.sample)  # of the error if pruned (out, in)
        self._gain = (self._share / variance).masked_fill(~mask, 0)
        self._score = (weight.abs() * square.sqrt()).masked_fill(mask, torch.inf)
        self._error = self._share.masked_fill(~mask, 0).sum(1)
        self._sign = self._error.sign()
        self._open = torch.ones_like(self._error, dtype=torch.bool)

    def exchange(self) -> bool:
        """Exchange two weights in every open row; False if no row is open."""
        sign = self._error.sign().unsqueeze(1)
        gain, grown = (self._gain * sign).max(1)
        score, pruned = self._candidates(sign, grown).min(1)
        change = self._at(self._share, pruned) - self._at(self._share, grown)
        self._open &= (self._error.abs() > THRESHOLD) & (gain > 0) & (score < torch.inf)
        if self._group is not None:
            self._open &= (self._error + change).sign() == self._sign
        rows = self._open.nonzero().squeeze(1)
        self.mask[rows, grown[rows]], self.mask[rows, pruned[rows]] = False, True
        self._gain[rows, grown[rows]], self._score[rows, pruned[rows]] = 0, torch.inf
        self._error += change.masked_fill(~self._open, 0)
        return bool(len(rows))

    def _candidates(self, sign: Tensor, grown: Tensor) -> Tensor:
        """The scores of the weights that may be pruned, infinite for others (out, in)."""
        if self._group is None:
            return self._score.masked_fill(self._share * sign >= 0, torch.inf)
        columns = torch.arange(self._score.shape[1], device=grown.device)
        others = columns // self._group != (grown // self._group).unsqueeze(1)
        return self._score.masked_fill(others, torch.inf)

    @staticmethod
    def _at(values: Tensor, columns: Tensor) -> Tensor:
        return values.gather(1, columns.unsqueeze(1)).squeeze(1)
