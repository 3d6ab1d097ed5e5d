"""ALPS: mask and weights by ADMM, weights refined by conjugate gradients (arXiv 2406.07831)."""

import torch
from torch import Tensor

from apt.solver import Gram, Pattern, Solution, SolverOptions, full_precision

_PENALTY = 0.1  # the initial ρ, for a Gram matrix of unit diagonal
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # (least change of the support, factor of ρ)
_INTERVAL = 3  # iterations between two checks of the support
_MAX_ITERATIONS = 300  # enough for ρ to grow at least 13,000-fold
_GRADIENT_STEPS = 10


@full_precision()
def alps(weight: Tensor, gram: Gram, pattern: Pattern, options: SolverOptions) -> Solution:
    """Choose the mask by ADMM with a growing penalty, then refine the kept weights.

    Inputs are scaled so that the damped Gram matrix has a unit diagonal; the weights that ADMM
    ranks are scaled inversely. An iteration costs two products of (out, in) by (in, in).

    Args:
        weight: the dense ``W`` (out, in).
        gram: the Gram matrix of the layer's inputs (in, in).
        pattern: the pattern; an unstructured one without ``per`` is counted over the layer.
        options: the options; only ``damping`` is used.

    Raises:
        SolverError: the Gram matrix cannot be factorised, see `Gram.damped`.
    """
    damped = gram.damped(options.damping)
    scale, unit = damped.unit.scale, damped.unit.matrix
    dense = weight.to(unit.dtype) * scale
    start, mask = _admm(dense, unit, pattern)
    solved = _conjugate_gradients(dense, unit, mask, start).div_(scale)
    return Solution(solved.to(weight.dtype), mask, damped.damping)


def _admm(dense: Tensor, unit: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Split ``W`` into free weights B and sparse weights D, which converge (algorithm 1).

    Args:
        dense: the scaled ``W`` (out, in).
        unit: ``H`` scaled to a unit diagonal (in, in).
        pattern: the pattern of D.

    Returns:
        D and its mask (True = pruned), both (out, in).
    """
    eigenvalues, basis = torch.linalg.eigh(unit)
    target = dense @ unit
    sparse, dual, penalty = dense, torch.zeros_like(dense), _PENALTY
    mask = settled = torch.zeros_like(dense, dtype=torch.bool)
    for iteration in range(1, _MAX_ITERATIONS + 1):
        right = (target - dual).add_(sparse, alpha=penalty)
        free = (right @ basis).div_(eigenvalues + penalty) @ basis.T
        sparse = torch.add(free, dual, alpha=1 / penalty)
        mask = pattern.smallest(sparse.abs())
        sparse.masked_fill_(mask, 0)
        dual.add_(free.sub_(sparse), alpha=penalty)
        if iteration % _INTERVAL == 0:
            changed = int((mask ^ settled).sum())
            if not changed:
                break
            penalty *= _growth(changed / max(1, int((~mask).sum())))
            settled = mask
    return sparse, mask


def _growth(changed: float) -> float:
    """The growth factor of ρ for the share of the support that has changed since the last check."""
    return next(factor for above, factor in _GROWTH if changed > above)


def _conjugate_gradients(dense: Tensor, unit: Tensor, mask: Tensor, start: Tensor) -> Tensor:
    """A few steps towards ``V_K H_KK = (W H)_K`` in every row, from ``start`` (algorithm 2).

    The paper's preconditioner is the diagonal, which is 1 after the scaling. The number of steps is
    that of the paper; `apt.solver.joint_weights` iterates until convergence.

    Args:
        dense: the scaled ``W`` (out, in).
        unit: ``H`` scaled to a unit diagonal (in, in).
        mask: True where pruned (out, in).
        start: weights (out, in), zero where pruned; changed in place.

    Returns:
        ``V`` (out, in), zero where pruned.
    """
    residual = ((dense - start) @ unit).masked_fill_(mask, 0)
    direction, power = residual.clone(), _dot(residual, residual)
    for _ in range(_GRADIENT_STEPS):
        image = (direction @ unit).masked_fill_(mask, 0)
        step = _ratio(power, _dot(direction, image))
        start.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        previous, power = power, _dot(residual, residual)
        direction = torch.addcmul(residual, _ratio(power, previous), direction)
    return start


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Row-wise inner products (out, 1)."""
    products: Tensor = torch.linalg.vecdot(left, right)
    return products.unsqueeze(1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient (out, 1); 0 for a solved row, where both are zero."""
    return numerator / denominator.clamp(min=torch.finfo(denominator.dtype).tiny)
