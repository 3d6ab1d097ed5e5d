"""The multiple removal problem for all columns at once: the best weights for a given mask."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from apt.solver.gram import DampedGram, Gram
from apt.solver.options import Solution, SolverOptions
from apt.solver.precision import full_precision
from apt.solver.scaled import Scaled

_DIRECT = 96  # columns up to which one factorisation per row is faster than conjugate gradients
_CHUNK = 2**25  # elements of the largest temporary: 128 MiB in fp32


@dataclass(frozen=True)
class Joint:
    """Weights solved jointly for a mask.

    Attributes:
        weight: ``V`` (out, in) in the dtype of ``H``, exactly zero where pruned.
        mask: True where pruned (out, in).
        loss: ``½ (v−w) H (v−w)ᵀ`` of every row (out,).
        residual: a certificate of accuracy: the norm of the residual of the normal equations,
            ``((W−V) H)_K`` with ``H`` scaled to a unit diagonal, relative to the square root of
            twice the loss. The share of the loss that further steps could remove is at most its
            square divided by the least eigenvalue of the scaled ``H``.
    """

    weight: Tensor
    mask: Tensor
    loss: Tensor
    residual: float


@full_precision()
def joint_weights(
    weight: Tensor,
    damped: DampedGram,
    mask: Tensor,
    start: Tensor | None = None,
    tolerance: float = 1e-3,
    max_steps: int = 200,
) -> Joint:
    """The least-squares weights on the kept columns: ``V_K H_KK = (W H)_K`` in every row.

    This is the closed form of the multiple removal problem (arXiv 2410.15567, the equation for
    ``δ``) with the whole row as one block. Narrow layers are solved directly, by one factorisation
    for each row. Wide layers are solved by conjugate gradients restricted to the kept weights, all
    rows together, on the matrix scaled to a unit diagonal; a step costs one product of (out, in)
    by (in, in). Each step lowers the loss of every row, so the result is never worse than
    ``start``.

    Args:
        weight: the dense ``W`` (out, in).
        damped: the damped Gram matrix ``H`` (in, in).
        mask: True where a weight is pruned (out, in).
        start: the initial weights (out, in), for instance those of the sequential sweep; their
            pruned entries are ignored. The default is ``weight``.
        tolerance: the solve stops when a step lowers the layer's loss
            ``½ tr((V−W) H (V−W)ᵀ)`` by less than this share of it.
        max_steps: the greatest number of steps.
    """
    unit = damped.unit
    dense = weight.to(unit.matrix.dtype) * unit.scale
    keep = (~mask).to(dense.dtype)
    if weight.shape[1] <= _DIRECT:
        solution, loss, residuals = _direct(dense, unit.matrix, keep)
    else:
        initial = dense if start is None else start * unit.scale
        solution, loss, residuals = _iterate(
            dense, unit, keep, initial * keep, tolerance, max_steps
        )
    lost, size = torch.stack([loss.sum(), residuals.norm()]).tolist()
    residual = size / math.sqrt(2 * lost) if lost > 0 else 0.0
    return Joint(solution.div_(unit.scale), mask, loss, residual)


def solve_masked(weight: Tensor, gram: Gram, mask: Tensor, options: SolverOptions) -> Solution:
    """The solution of a layer for a given mask, with the weights of `joint_weights`.

    Args:
        weight: the dense ``W`` or another target (out, in).
        gram: the Gram matrix of the inputs (in, in).
        mask: True where a weight is pruned (out, in).
        options: the damping and the tolerance.

    Raises:
        SolverError: the Gram matrix is unusable.
    """
    if not mask.any():
        return Solution(weight, mask)
    damped = gram.damped(options.damping)
    solved = joint_weights(weight, damped, mask, None, options.tolerance)
    return Solution(solved.weight.to(weight.dtype), mask, damped.damping, solved.residual)


def _direct(dense: Tensor, matrix: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Solve by Cholesky: the solution (out, in), the losses (out,), the residual (out, in)."""
    right = (dense @ matrix).mul_(keep)
    rows = max(1, _CHUNK // matrix.numel())
    parts = []
    for kept, b in zip(torch.split(keep, rows), torch.split(right, rows), strict=True):
        padded = matrix * kept.unsqueeze(2) * kept.unsqueeze(1)
        padded.diagonal(dim1=1, dim2=2).add_(1 - kept)
        parts.append(torch.cholesky_solve(b.unsqueeze(2), torch.linalg.cholesky(padded)))
    solution = torch.cat(parts).squeeze(2)
    missing = dense - solution
    residual = missing @ matrix
    return solution, torch.linalg.vecdot(missing, residual) / 2, residual.mul_(keep)


def _iterate(
    dense: Tensor, unit: Scaled, keep: Tensor, solution: Tensor, tolerance: float, max_steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Conjugate gradients that start at ``solution``, in place; returns the same as `_direct`."""
    precondition = _deflation(unit, keep)
    missing = dense - solution
    residual = missing @ unit.matrix
    loss = _dot(missing, residual).div_(2)
    direction, scaled, image = residual.mul_(keep).clone(), missing, torch.empty_like(missing)
    precondition(residual, direction)
    power = _dot(residual, direction)
    for _ in range(max_steps):
        torch.mm(direction, unit.matrix, out=image).mul_(keep)
        step = _ratio(power, _dot(direction, image))
        solution.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        decreases = (step * power).div_(2)
        loss.sub_(decreases)
        sums = torch.stack([decreases.sum(), loss.sum()])
        decrease, remaining = sums.tolist()  # one wait for a device
        if decrease <= tolerance * max(remaining, 0.0):
            break
        precondition(residual, scaled)
        previous, power = power, _dot(residual, scaled)
        direction.mul_(_ratio(power, previous)).add_(scaled)
    return solution, loss.squeeze(1), residual


def _deflation(unit: Scaled, keep: Tensor) -> Callable[[Tensor, Tensor], None]:
    """A preconditioner that deflates the outlier directions.

    Activations of language models are far larger in a few directions than in all others, and each
    such direction costs a step of conjugate gradients. The matrix is approximately
    ``μI + Q (Λ − μI) Qᵀ`` with its largest eigenvalues Λ. Restricted to the kept weights of a row,
    this is inverted by Woodbury's identity at the cost of a few percent of a step. Q may be
    approximate: the result is symmetric positive definite for every Q.

    Args:
        unit: a matrix of unit diagonal (in, in).
        keep: 1 where a weight is kept, else 0 (out, in).

    Returns:
        A function that takes residuals (out, in), zero where pruned, and writes the preconditioned
        residuals to its second argument.
    """
    width = len(unit.matrix)
    values, basis = unit.outliers
    bulk = (width - values.sum()).clamp(min=1e-3 * width) / max(1, width - len(values))
    inner = torch.diag(bulk / (values - bulk).clamp(min=1e-3 * bulk))
    pairs = (basis.unsqueeze(2) * basis.unsqueeze(1)).flatten(1)
    inverse = torch.linalg.inv((keep @ pairs).view(-1, len(values), len(values)) + inner)

    def precondition(residual: Tensor, result: Tensor) -> None:
        inside = (residual @ basis).unsqueeze(1) @ inverse
        torch.mm(inside.squeeze(1), basis.T, out=result).mul_(keep)
        torch.sub(residual, result, out=result)

    return precondition


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Row-wise inner products (out, 1)."""
    products: Tensor = torch.linalg.vecdot(left, right)
    return products.unsqueeze(1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient; 0 for a row that has converged, where both are zero."""
    return (numerator / denominator).where(denominator > 0, numerator.new_zeros(()))


@full_precision()
def relative_layer_error(dense: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """``tr((V−W) G (V−W)ᵀ) / tr(W G Wᵀ)``: the share of the output's energy that is lost.

    Args:
        dense, pruned: ``W`` and ``V`` (out, in).
        gram: the undamped ``XᵀX`` (in, in), in any scale.

    Returns:
        The error. If the dense output is zero, 0 if nothing is lost, else infinity.
    """
    error, energy = _energy(pruned - dense, gram), _energy(dense, gram)
    return error / energy if energy else (math.inf if error else 0.0)


def _energy(weight: Tensor, gram: Tensor) -> float:
    return float((weight @ gram).mul_(weight).sum(dtype=weight.dtype).clamp_(min=0))
