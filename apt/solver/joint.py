"""The multiple removal problem for all columns at once: the best weights for a given mask."""

from torch import Tensor


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
    restricted to the kept weights and preconditioned by the diagonal of ``H``; a step costs one
    product of (out, in) by (in, in). Each step lowers the loss of every row, so the result is
    never worse than ``start``.

    Args:
        weight: the dense ``W`` (out, in).
        matrix: the damped Gram matrix ``H`` (in, in), symmetric positive definite.
        mask: True where a weight is pruned (out, in).
        start: weights (out, in) to start from, for instance those of the sequential sweep; their
            pruned entries are ignored. The kept entries of ``weight`` by default.
        tolerance: stop when ``‖((W−V)H)_K‖`` has fallen to this share of ``‖((W−W_K)H)_K‖``, the
            residual before any compensation.
        max_steps: stop after this many steps in any case.

    Returns:
        ``V`` (out, in), exactly zero where ``mask`` is True.
    """
    keep = (~mask).to(weight.dtype)
    inverse_diagonal = keep / matrix.diagonal()
    solution = (weight if start is None else start) * keep
    residual = ((weight - solution) @ matrix).mul_(keep)
    goal = tolerance * float((((weight * mask) @ matrix) * keep).norm())
    scaled = residual * inverse_diagonal
    direction = scaled
    power = _dot(residual, scaled)
    for _ in range(max_steps):
        if float(residual.norm()) <= goal:
            break
        image = (direction @ matrix).mul_(keep)
        step = _ratio(power, _dot(direction, image))
        solution.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        scaled = residual * inverse_diagonal
        previous, power = power, _dot(residual, scaled)
        direction = scaled.addcmul_(_ratio(power, previous), direction)
    return solution


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Row-wise inner products (out, 1)."""
    return (left * right).sum(1, keepdim=True)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, 0 where a row has converged and both vanish."""
    return (numerator / denominator).where(denominator > 0, numerator.new_zeros(()))
