"""The multiple removal problem for all columns at once: the best weights for a given mask."""

from collections.abc import Callable

import torch
from torch import Tensor

from apt.solver.precision import full_precision

_OUTLIERS = 16  # directions in which inputs are far larger than elsewhere


@full_precision()
def joint_weights(
    weight: Tensor,
    matrix: Tensor,
    mask: Tensor,
    start: Tensor | None = None,
    tolerance: float = 1e-3,
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
    precondition = _deflation(unit, keep)
    solution = (weight if start is None else start) * keep * scale
    missing = weight * scale - solution
    residual = missing @ unit
    loss = 0.5 * float(_dot(missing, residual).sum())
    direction = precondition(residual.mul_(keep))
    power = _dot(residual, direction)
    for _ in range(max_steps):
        image = (direction @ unit).mul_(keep)
        step = _ratio(power, _dot(direction, image))
        solution.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        lowered = 0.5 * float((step * power).sum())
        loss -= lowered
        if lowered <= tolerance * max(loss, 0.0):
            break
        scaled = precondition(residual)
        previous, power = power, _dot(residual, scaled)
        direction = scaled.addcmul_(_ratio(power, previous), direction)
    return solution.div_(scale)


def _deflation(unit: Tensor, keep: Tensor) -> Callable[[Tensor], Tensor]:
    """A preconditioner that takes a few outlier directions off the conjugate gradients' hands.

    Activations of language models are far larger in a few directions than elsewhere, and each
    such direction costs a step. ``unit`` is about ``μI + Q (Λ − μI) Qᵀ`` with its largest
    eigenvalues Λ; the same restricted to a row's kept weights is inverted by Woodbury's identity
    at the cost of a few percent of a step. An approximate Q is as good: the result is symmetric
    positive definite whatever Q is.

    Args:
        unit: a symmetric positive definite matrix of unit diagonal (in, in).
        keep: 1 where a weight is kept, else 0 (out, in).

    Returns:
        A function from residuals (out, in), zero where pruned, to preconditioned ones.
    """
    width = len(unit)
    count = min(_OUTLIERS, width // 8)
    if count == 0:
        return Tensor.clone
    values, basis = _largest(unit, count)
    bulk = (width - values.sum()).clamp(min=1e-3 * width) / (width - count)
    inner = torch.diag(bulk / (values - bulk).clamp(min=1e-3 * bulk))
    pairs = (basis.unsqueeze(2) * basis.unsqueeze(1)).flatten(1)
    inverse = torch.linalg.inv((keep @ pairs).view(-1, count, count) + inner)

    def precondition(residual: Tensor) -> Tensor:
        inside = (residual @ basis).unsqueeze(1) @ inverse
        return torch.addcmul(residual, inside.squeeze(1) @ basis.T, keep, value=-1)

    return precondition


def _largest(unit: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """About the ``count`` largest eigenvalues (count,) and eigenvectors (in, count)."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(len(unit), count, generator=generator).to(unit)
    for _ in range(5):
        basis = torch.linalg.qr(unit @ basis).Q
    values, rotation = torch.linalg.eigh(basis.T @ unit @ basis)
    return values, basis @ rotation


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Row-wise inner products (out, 1)."""
    products: Tensor = torch.linalg.vecdot(left, right)
    return products.unsqueeze(1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, 0 where a row has converged and both vanish."""
    return (numerator / denominator).where(denominator > 0, numerator.new_zeros(()))
