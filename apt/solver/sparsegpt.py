"""Masks and compensations, single and multiple: the methods SS, SM, MS and MM.

The methods are those of "Pruning Foundation Models for High Accuracy without Retraining" (arXiv
2410.15567). A sweep goes over the columns from left to right. ``F`` denotes the columns that are
not yet frozen, and ``H`` the damped Gram matrix, SparseGPT's Hessian. The factor ``U`` of its
inverse (`DampedGram.factor`) gives ``[H_FF]⁻¹ = U_FFᵀ U_FF`` in every step.

- *Mask S*: the weights of lowest ``w²/[H_FF⁻¹]_jj``, which is ``w²/U_jj²``. An unstructured mask is
  selected over windows of columns, an n:m mask within each group when the sweep reaches it.
- *Mask M* (n:m only): of all removal sets of a group, the one of least joint loss
  ``½ w_P ([H_FF⁻¹]_PP)⁻¹ w_Pᵀ``.
- *Compensation S*: column by column, with an update of the columns to the right (SparseGPT).
- *Compensation M*: all removals of a block of B columns jointly, with an update of its kept columns
  and of all columns to the right. If B is all columns, it is the least-squares optimum for the
  mask.

Every compensation is written as coefficients ``E`` with the update ``W_F −= E U_B,F``. So one sweep
implements all of them, and distant columns are updated by one product per block.

Inside a block of compensation M, the mask can depend on the compensated weights: every S mask does,
and the M mask of every group but the first. Such a mask comes from a sweep with single
compensation over the block.
"""

import math
from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from apt.patterns import Pattern, lowest_k
from apt.solver.gram import DampedGram, Gram, SolverError
from apt.solver.least_squares import joint_weights
from apt.solver.options import Solution, SolverOptions, check_fit
from apt.solver.precision import full_precision

MAX_REMOVAL_SETS = 20_000
"""The limit of removal sets per group for mask M; C(16, 8) = 12,870 is below it."""

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
    """Mask M (mask S if the pattern is unstructured), compensation S."""
    return _solve(weight, gram, pattern, options, multiple_mask=True, multiple=False)


def mm(weight: Tensor, gram: Gram, pattern: Pattern, options: SolverOptions) -> Solution:
    """Mask M (mask S if the pattern is unstructured), compensation M."""
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
    sweep = _Sweep(pattern, options.mask_window, multiple_mask, dense)
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
    """Single compensation from left to right, which also selects the mask.

    Weights are transposed, (in, out), so that a column of the layer is one contiguous row.
    """

    def __init__(self, pattern: Pattern, window: int, multiple_mask: bool, weight: Tensor) -> None:
        check_fit(weight, pattern)
        self.pattern, aligned = pattern, pattern.alignment
        self.window, self.strip = aligned * max(1, window // aligned), _STRIP
        self.choose: Callable[[Tensor, Tensor], Tensor] | None = None
        if pattern.group:
            self.window, self.strip = aligned * max(1, _WINDOW // aligned), aligned
            self.choose = (
                _set_mask(pattern, weight.device) if multiple_mask else _group_mask(pattern)
            )

    def run(self, weight: Tensor, factor: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Prune ``weight`` (out, in): returns the compensated weights and the mask, both (out, in).

        If ``weight`` is a part of a layer, ``offset`` is the index of its first column.
        """
        columns = weight.T.clone(memory_format=torch.contiguous_format)  # a copy in any layout
        mask = torch.zeros_like(columns, dtype=torch.bool)
        for start in range(0, len(columns), self.window):
            window = slice(start, min(start + self.window, len(columns)))
            rest = slice(window.stop, None)
            coefficients = self._window(
                columns[window], factor[window, window], mask[window], offset + start
            )
            columns[rest].addmm_(factor[window, rest].T, coefficients, alpha=-1)
        return columns.T.masked_fill(mask.T, 0), mask.T.contiguous()

    def _window(self, columns: Tensor, factor: Tensor, mask: Tensor, offset: int) -> Tensor:
        """Prune a window, ``columns`` and ``mask`` (window, out), in place; returns ``Eᵀ``."""
        coefficients = torch.empty_like(columns)
        if self.choose is None:
            scores = columns / factor.diagonal().unsqueeze(1)
            mask.copy_(self.pattern.lowest(scores.square_().T, offset=offset).T)
        for start in range(0, len(columns), self.strip):
            strip, rest = slice(start, start + self.strip), slice(start + self.strip, None)
            if self.choose is not None:
                mask[strip] = self.choose(columns[strip], factor[strip, strip])
            _single(columns[strip], factor[strip, strip], mask[strip], coefficients[strip])
            columns[rest].addmm_(factor[strip, rest].T, coefficients[strip], alpha=-1)
        return coefficients


def _single(columns: Tensor, factor: Tensor, mask: Tensor, coefficients: Tensor) -> None:
    """Remove the masked weights column by column and update the columns to the right, in place."""
    coefficients.copy_(mask)
    rows = zip(columns, coefficients, factor.diagonal(), strict=True)
    for j, (column, removed, pivot) in enumerate(rows):
        removed.mul_(column).div_(pivot)
        columns[j:].addr_(factor[j, j:], removed, alpha=-1)


def _group_mask(pattern: Pattern) -> Callable[[Tensor, Tensor], Tensor]:
    """Mask S of one group: the lowest ``w²/U_jj²``."""

    removed = pattern.required((1, pattern.alignment))

    def choose(columns: Tensor, factor: Tensor) -> Tensor:
        scores = columns / factor.diagonal().unsqueeze(1)
        return lowest_k(scores.square_().T, removed).T

    return choose


def _set_mask(pattern: Pattern, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Mask M of one group: the removal set of least joint loss, of all C(m, n)."""
    size = pattern.alignment
    removed = pattern.required((1, size))
    if math.comb(size, removed) > MAX_REMOVAL_SETS:
        raise SolverError(
            f"mask M would enumerate {math.comb(size, removed):,} removal sets per group "
            f"for {pattern}; use mask S (ss or sm)"
        )
    sets = torch.tensor(list(combinations(range(size), removed)), device=device)

    def choose(columns: Tensor, factor: Tensor) -> Tensor:
        inverse = factor.T @ factor
        # Parts of a positive definite matrix: a check in each group would wait for the device.
        joint = torch.linalg.inv_ex(inverse[sets[:, :, None], sets[:, None, :]]).inverse
        rows = max(1, _CHUNK // sets.numel())
        best = torch.cat([_best_set(part, sets, joint) for part in torch.split(columns.T, rows)])
        return torch.zeros_like(columns, dtype=torch.bool).scatter_(0, best.T, True)

    return choose


def _best_set(weight: Tensor, sets: Tensor, joint: Tensor) -> Tensor:
    """The columns of the set of least joint loss, for each row of ``weight`` (rows, m)."""
    values = weight[:, sets]
    loss = torch.einsum("rsp,spq,rsq->rs", values, joint, values)
    return sets[loss.argmin(1)]


def _blockwise(
    weight: Tensor, damped: DampedGram, sweep: _Sweep, block: int
) -> tuple[Tensor, Tensor]:
    """Compensation M by blocks of ``block`` columns; see the module's docstring."""
    if block % sweep.pattern.alignment:
        raise SolverError(f"block size {block} is not a multiple of {sweep.pattern.alignment}")
    current, factor = weight.clone(), damped.factor
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], block):
        columns, rest = slice(start, start + block), slice(start, None)
        _, mask[:, columns] = sweep.run(current[:, columns], factor[columns, columns], start)
        coefficients = _joint_coefficients(
            current[:, columns], factor[columns, columns], mask[:, columns]
        )
        current[:, rest].addmm_(coefficients, factor[columns, rest], alpha=-1)
        current[:, columns].masked_fill_(mask[:, columns], 0)
    return current, mask


def _joint_coefficients(weight: Tensor, factor: Tensor, mask: Tensor) -> Tensor:
    """The coefficients ``E`` (out, B) that remove the masked weights of a block jointly.

    The multipliers solve ``λ [H⁻¹]_PP = w_P`` in every row. Rows differ in P, so the system is
    padded: ``A = D_p [H⁻¹]_BB D_p + (I − D_p)`` has the same solution on P and zero outside, and
    one batched Cholesky factorisation solves many rows.
    """
    inverse = factor.T @ factor
    rows = max(1, _CHUNK // inverse.numel())
    parts = zip(torch.split(weight, rows), torch.split(mask.to(weight.dtype), rows), strict=True)
    return torch.cat([_multipliers(part, inverse, pruned) for part, pruned in parts]) @ factor.T


def _multipliers(weight: Tensor, inverse: Tensor, pruned: Tensor) -> Tensor:
    """The multipliers ``λ`` (rows, B) of the padded systems; see `_joint_coefficients`."""
    padded = inverse * pruned.unsqueeze(2) * pruned.unsqueeze(1)
    padded.diagonal(dim1=1, dim2=2).add_(1 - pruned)
    lower = torch.linalg.cholesky(padded)
    return torch.cholesky_solve((weight * pruned).unsqueeze(2), lower).squeeze(2)
