"""Masks and compensations, single and multiple: the methods SS, SM, MS and MM.

After "Pruning Foundation Models for High Accuracy without Retraining" (arXiv 2410.15567). Columns
are swept from left to right; with ``F`` the columns not yet frozen and ``U`` the factor of the
inverse (`DampedGram.factor`), ``[H_FF]⁻¹ = U_FFᵀ U_FF`` is at hand in every step.

- *Mask S*: the lowest ``w²/[H_FF⁻¹]_jj``, which is ``w²/U_jj²``; unstructured over windows of
  columns, n:m within each group as the sweep reaches it.
- *Mask M* (n:m only): of all removal sets of a group, the one of least joint loss
  ``½ w_P ([H_FF⁻¹]_PP)⁻¹ w_Pᵀ``.
- *Compensation S*: column by column, updating the columns to the right (SparseGPT).
- *Compensation M*: all removals of a block of B columns jointly, updating its kept columns and all
  columns to the right. With B = all columns it is the least-squares optimum for the mask.

Every compensation is written as coefficients ``E`` with the update ``W_F −= E U_B,F``, so that one
sweep serves them all and far columns are updated by one product a block.

Where the mask inside a block of compensation M depends on the weights (as every S mask and every
later group's M mask does), it is the one that a sweep with single compensation finds there.
"""

import math
from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from apt.solver.gram import DampedGram, Gram, SolverError
from apt.solver.least_squares import joint_weights
from apt.solver.options import Solution, SolverOptions
from apt.solver.patterns import NM, Pattern, Unstructured, lowest, lowest_k
from apt.solver.precision import full_precision

MAX_REMOVAL_SETS = 20_000
"""The most removal sets a group that mask M enumerates; C(16, 8) = 12,870 is within."""

_WINDOW = 128  # columns updated together, as SparseGPT does
_STRIP = 32  # columns of a window updated one by one before the rest of it follows
_CHUNK = 2**25  # elements of the largest temporary: 128 MiB in fp32


def ss(weight: Tensor, gram: Gram, pattern: Pattern, options: SolverOptions) -> Solution:
    """Mask S, compensation S: SparseGPT (arXiv 2301.00774)."""
    return _solve(weight, gram, pattern, options, multiple_mask=False, multiple=False)


def sm(weight: Tensor, gram: Gram, pattern: Pattern, options: SolverOptions) -> Solution:
    """Mask S, compensation M."""
    return _solve(weight, gram, pattern, options, multiple_mask=False, multiple=True)


def ms(weight: Tensor, gram: Gram, pattern: Pattern, options: SolverOptions) -> Solution:
    """Mask M (S where the pattern is unstructured), compensation S."""
    return _solve(weight, gram, pattern, options, multiple_mask=True, multiple=False)


def mm(weight: Tensor, gram: Gram, pattern: Pattern, options: SolverOptions) -> Solution:
    """Mask M (S where the pattern is unstructured), compensation M."""
    return _solve(weight, gram, pattern, options, multiple_mask=True, multiple=True)


@full_precision()
def _solve(
    weight: Tensor,
    gram: Gram,
    pattern: Pattern,
    options: SolverOptions,
    *,
    multiple_mask: bool,
    multiple: bool,
) -> Solution:
    width = weight.shape[1]
    damped = gram.damped(options.damping)
    dense = weight.to(damped.matrix.dtype)
    sweep = _Sweep(pattern, options.mask_window, multiple_mask, width)
    if not multiple:
        pruned, mask = sweep.run(dense, damped.factor)
    elif options.block_size is None or options.block_size >= width:
        start, mask = sweep.run(dense, damped.factor)
        joint = joint_weights(dense, damped, mask, start, options.tolerance)
        return Solution(joint.weight.to(weight.dtype), mask, damped.damping, joint.residual)
    else:
        pruned, mask = _blockwise(dense, damped, sweep, options.block_size)
    return Solution(pruned.to(weight.dtype), mask, damped.damping)


class _Sweep:
    """Single compensation from left to right, choosing the mask on the way.

    Weights are held transposed, (in, out): a column of the layer is then one contiguous row.
    """

    def __init__(self, pattern: Pattern, window: int, multiple_mask: bool, width: int) -> None:
        self.pattern = pattern
        self.window, self.strip = window, _STRIP
        self.choose: Callable[[Tensor, Tensor], Tensor] | None = None
        if isinstance(pattern, NM):
            if width % pattern.m:
                raise SolverError(f"the input width {width} is not a multiple of {pattern.m}")
            self.window = self.strip = pattern.m
            self.window *= max(1, _WINDOW // pattern.m)
            self.choose = _set_mask(pattern) if multiple_mask else _group_mask(pattern)

    def run(self, weight: Tensor, factor: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Prune ``weight`` (out, in): the compensated weights and the mask, both (out, in).

        ``offset`` is the first column's place in the layer, where ``weight`` is a part of it.
        """
        columns = weight.T.contiguous()
        mask = torch.zeros_like(columns, dtype=torch.bool)
        for start in range(0, len(columns), self.window):
            here = slice(start, min(start + self.window, len(columns)))
            rest = slice(here.stop, None)
            coefficients = self._window(
                columns[here], factor[here, here], mask[here], offset + start
            )
            columns[rest].addmm_(factor[here, rest].T, coefficients, alpha=-1)
        return columns.T.masked_fill(mask.T, 0), mask.T.contiguous()

    def _window(self, columns: Tensor, factor: Tensor, mask: Tensor, offset: int) -> Tensor:
        """Prune a window in place: columns and mask (window, out); returns ``Eᵀ``."""
        coefficients = torch.empty_like(columns)
        if self.choose is None:
            scores = columns / factor.diagonal().unsqueeze(1)
            assert isinstance(self.pattern, Unstructured)
            mask.copy_(lowest(scores.square_().T, self.pattern, offset=offset).T)
        for start in range(0, len(columns), self.strip):
            here, rest = slice(start, start + self.strip), slice(start + self.strip, None)
            if self.choose is not None:
                mask[here] = self.choose(columns[here], factor[here, here])
            _single(columns[here], factor[here, here], mask[here], coefficients[here])
            columns[rest].addmm_(factor[here, rest].T, coefficients[here], alpha=-1)
        return coefficients


def _single(columns: Tensor, factor: Tensor, mask: Tensor, coefficients: Tensor) -> None:
    """Remove the masked weights column by column, updating the columns to the right, in place."""
    for j, pivot in enumerate(factor.diagonal().tolist()):
        removed = torch.mul(columns[j], mask[j], out=coefficients[j]).div_(pivot)
        columns[j:].addr_(factor[j, j:], removed, alpha=-1)


def _group_mask(pattern: NM) -> Callable[[Tensor, Tensor], Tensor]:
    """Mask S of one group: the lowest ``w²/U_jj²``."""

    def choose(columns: Tensor, factor: Tensor) -> Tensor:
        scores = columns / factor.diagonal().unsqueeze(1)
        return lowest_k(scores.square_().T, pattern.m - pattern.n).T

    return choose


def _set_mask(pattern: NM) -> Callable[[Tensor, Tensor], Tensor]:
    """Mask M of one group: the removal set of least joint loss, of all C(m, n)."""
    removed = pattern.m - pattern.n
    if math.comb(pattern.m, removed) > MAX_REMOVAL_SETS:
        raise SolverError(
            f"mask M would enumerate {math.comb(pattern.m, removed):,} removal sets a group "
            f"for {pattern}; use mask S (ss or sm)"
        )
    sets = torch.tensor(list(combinations(range(pattern.m), removed)))

    def choose(columns: Tensor, factor: Tensor) -> Tensor:
        indices = sets.to(columns.device)
        inverse = factor.T @ factor
        joint = torch.linalg.inv(inverse[indices[:, :, None], indices[:, None, :]])
        rows = max(1, _CHUNK // (indices.numel()))
        best = torch.cat([_best_set(part, indices, joint) for part in torch.split(columns.T, rows)])
        return torch.zeros_like(columns, dtype=torch.bool).scatter_(0, best.T, True)

    return choose


def _best_set(weight: Tensor, sets: Tensor, joint: Tensor) -> Tensor:
    """For each row of ``weight`` (rows, m) the columns of the set of least joint loss."""
    values = weight[:, sets]
    loss = torch.einsum("rsp,spq,rsq->rs", values, joint, values)
    return sets[loss.argmin(1)]


def _blockwise(
    weight: Tensor, damped: DampedGram, sweep: _Sweep, block: int
) -> tuple[Tensor, Tensor]:
    """Joint compensation of ``block`` columns at a time; see the module's head."""
    if isinstance(sweep.pattern, NM) and block % sweep.pattern.m:
        raise SolverError(f"block size {block} is not a multiple of {sweep.pattern.m}")
    current, factor = weight.clone(), damped.factor
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], block):
        here, rest = slice(start, start + block), slice(start, None)
        _, mask[:, here] = sweep.run(current[:, here], factor[here, here], start)
        coefficients = _joint_coefficients(current[:, here], factor[here, here], mask[:, here])
        current[:, rest].addmm_(coefficients, factor[here, rest], alpha=-1)
        current[:, here].masked_fill_(mask[:, here], 0)
    return current, mask


def _joint_coefficients(weight: Tensor, factor: Tensor, mask: Tensor) -> Tensor:
    """``E`` (out, B) that removes a block's masked weights jointly.

    The multipliers solve ``λ [H⁻¹]_PP = w_P`` in every row. Rows differ in P, so the system is
    padded: ``A = D_p [H⁻¹]_BB D_p + (I − D_p)`` has the same solution on P and none outside, and
    one batched Cholesky factorisation serves many rows.
    """
    inverse = factor.T @ factor
    rows = max(1, _CHUNK // inverse.numel())
    parts = zip(torch.split(weight, rows), torch.split(mask.to(weight.dtype), rows), strict=True)
    return torch.cat([_multipliers(part, inverse, pruned) for part, pruned in parts]) @ factor.T


def _multipliers(weight: Tensor, inverse: Tensor, pruned: Tensor) -> Tensor:
    padded = inverse * pruned.unsqueeze(2) * pruned.unsqueeze(1)
    padded.diagonal(dim1=1, dim2=2).add_(1 - pruned)
    lower = torch.linalg.cholesky(padded)
    return torch.cholesky_solve((weight * pruned).unsqueeze(2), lower).squeeze(2)
