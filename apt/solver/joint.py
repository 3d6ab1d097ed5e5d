"""The multiple removal problem for all columns at once: the best weights for a given mask."""

import torch
from torch import Tensor

from apt.solver.precision import full_precision


@full_precision()
def joint_weights(
    weight: Tensor,
    matrix: Tensor,
    mask: Tensor,
    start: Tensor | None = None,
    tolerance: float = 5e-4,
    max_steps: int = 200,
) -> Tensor:
    """The least-squares weights on the kept columns: ``V_K H_KK = (W H)_K`` in every row.

    This is the closed form of the multiple removal problem (arXiv 2410.15567, its equation for
    ``δ``) with the whole row as one block. All rows are solved together by conjugate gradients
    restricted to the kept weights, on the matrix scaled to a unit diagonal; a step costs one
    product of (out, in) by (in, in). Each step lowers the loss of every row, so the result is
    never worse than ``start``.

    Args:
        weight: the dense ``W`` (out, in).
        matrix: the damped Gram matrix ``H`` (in, in), symmetric positive definite.
        mask: True where a weight is pruned (out, in).
        start: weights (out, in) to start from, for instance those of the sequential sweep; their
            pruned entries are ignored. The kept entries of ``weight`` by default.
        tolerance: stop when a step lowers the layer's loss ``½ tr((V−W) H (V−W)ᵀ)`` by less than
            this share of it.
        max_steps: stop after this many steps in any case.

    Returns:
        ``V`` (out, in), exactly zero where ``mask`` is True.
    """
    keep = (~mask).to(weight.dtype)
    scale = matrix.diagonal().sqrt()
    unit = matrix / scale / scale.unsqueeze(1)
    solution = (weight if start is None else start) * keep * scale
    missing = weight * scale - solution
    residual = missing @ unit
    loss = 0.5 * float(_dot(missing, residual).sum())
    direction = residual.mul_(keep).clone()
    power = _dot(residual, residual)
    for _ in range(max_steps):
        image = (direction @ unit).mul_(keep)
        step = _ratio(power, _dot(direction, image))
        solution.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        lowered = 0.5 * float((step * power).sum())
        loss -= lowered
        if lowered <= tolerance * max(loss, 0.0):
            break
        previous, power = power, _dot(residual, residual)
        direction.mul_(_ratio(power, previous)).add_(residual)
    return solution.div_(scale)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Row-wise inner products (out, 1)."""
    products: Tensor = torch.linalg.vecdot(left, right)
    return products.unsqueeze(1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, 0 where a row has converged and both vanish."""
    return (numerator / denominator).where(denominator > 0, numerator.new_zeros(()))
