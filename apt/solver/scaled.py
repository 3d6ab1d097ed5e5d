"""A damped Gram matrix scaled by a diagonal, its outliers, and the operators of the mask search."""

from collections.abc import Iterable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from apt.devices import multiplies_bf16
from apt.solver.precision import full_precision

NODES = (0.6, 1.2)  # penalties of which the inverses are computed
_EXACT = (0.05, 0.9)  # eigenvalues for which the interpolation between the nodes has no error
_OUTLIERS = 8  # directions in which activations are far larger than elsewhere

_CACHE = 2**29  # bytes of the inverses kept for each Gram matrix: two of 11,008 inputs in bf16
_LEAF = 128  # smaller matrices are inverted without recursion
BF16_WIDTH = 512  # inputs from which the speed of bf16 products outweighs their rounding errors


class Scaled:
    """``S⁻¹ H S⁻¹`` (in, in) for a diagonal ``S``, ``scale`` (in,); weights scale as ``W S``."""

    def __init__(self, scale: Tensor, matrix: Tensor) -> None:
        self.scale, self.matrix = scale, matrix
        self._cached: dict[float, Tensor] = {}

    @cached_property
    def outliers(self) -> tuple[Tensor, Tensor]:
        """Approximations of the largest eigenvalues (count,) and their eigenvectors (in, count)."""
        count = max(1, min(_OUTLIERS, len(self.matrix) // 8))
        generator = torch.Generator().manual_seed(0)
        basis = torch.randn(
            len(self.matrix), count, generator=generator, dtype=torch.float32, device="cpu"
        )
        basis = basis.to(self.matrix)
        for _ in range(5):
            basis = torch.linalg.qr(self.matrix @ basis).Q
        values, rotation = torch.linalg.eigh(basis.T @ self.matrix @ basis)
        return values, basis @ rotation

    def proximals(self, penalties: Iterable[float]) -> Iterator[Tensor]:
        """Approximations of ``ρ (H + ρI)⁻¹`` of the scaled matrix (in, in), for each penalty ρ.

        Inverses are computed for two penalties. For other penalties, the operator is a weighted sum
        of both (`_shares`). Its eigenvalues are between 0 and 1. For penalties from 0.5 to 1.4, and
        for every eigenvalue of H, their error is below 0.007, about the rounding error of bf16. So
        the operators are in bf16 if the machine multiplies bf16 faster and the matrix is large and
        not in fp64.

        Each matrix is overwritten by the next one. Sites that share an input need the same
        inverses, so these are cached, up to `_CACHE` bytes.
        """
        nodes: dict[float, Tensor] = {}
        mixed: Tensor | None = None
        for penalty in penalties:
            for node in (penalty,) if penalty in NODES else NODES:
                if node not in nodes:
                    nodes[node] = self._proximal(node)
            if penalty in NODES:
                yield nodes[penalty]
                continue
            low, high = _shares(penalty)
            mixed = torch.mul(nodes[NODES[0]], low, out=mixed)
            yield mixed.add_(nodes[NODES[1]], alpha=high)

    @full_precision()
    def _proximal(self, penalty: float) -> Tensor:
        """``ρ (H + ρI)⁻¹`` (in, in)."""
        if penalty in self._cached:
            return self._cached[penalty]
        inverse = self._shifted_inverse(penalty).mul_(penalty)
        wide = len(inverse) >= BF16_WIDTH and inverse.dtype == torch.float32
        if wide and multiplies_bf16(inverse.device):
            inverse = inverse.bfloat16()
        if len(NODES) * inverse.nbytes <= _CACHE:
            self._cached[penalty] = inverse
        return inverse

    def _shifted_inverse(self, penalty: float) -> Tensor:
        """``(H + ρI)⁻¹`` (in, in). The diagonal is changed in place, since a copy is large."""
        diagonal = self.matrix.diagonal()
        before = diagonal.clone()
        diagonal.add_(penalty)
        try:
            return positive_inverse(self.matrix)
        finally:
            diagonal.copy_(before)


def _shares(penalty: float) -> tuple[float, float]:
    """The shares of both nodes in the operator of another penalty.

    For an eigenvalue λ of H the operator has the eigenvalue ``ρ / (λ + ρ)``. A sum of two such
    fractions with other penalties a and b can be exact for two values of λ, `_EXACT`; partial
    fractions give the shares.
    """
    low, high = NODES

    def roots(shift: float) -> float:
        return (shift + _EXACT[0]) * (shift + _EXACT[1])

    scale = penalty / (roots(penalty) * (high - low))
    return (
        scale * (high - penalty) * roots(low) / low,
        scale * (penalty - low) * roots(high) / high,
    )


def positive_inverse(matrix: Tensor) -> Tensor:
    """The inverse of a positive definite matrix (n, n).

    It is computed recursively from its halves, by the Schur complement: most of the work is then in
    products, which run at twice the speed of LAPACK's inversion. If the precision of fp32 does not
    suffice, as for few tokens with large outliers, it is computed in fp64.

    Raises:
        torch.linalg.LinAlgError: the matrix is not positive definite.
    """
    failures = list[Tensor]()
    inverse = _inverse_by_halves(matrix, failures)
    if not bool(torch.stack(failures).any()):  # one wait for the device, not one for each part
        return inverse
    if matrix.dtype == torch.float64:
        raise torch.linalg.LinAlgError("the matrix is not positive definite")  # type: ignore[attr-defined]
    return positive_inverse(matrix.double()).to(matrix.dtype)


def _inverse_by_halves(matrix: Tensor, failures: list[Tensor]) -> Tensor:
    """The inverse; ``failures`` gets a number for each factorisation, 0 if it succeeded."""
    half = len(matrix) // 2
    if half < _LEAF:
        lower, info = torch.linalg.cholesky_ex(matrix)
        failures.append(info)
        return torch.cholesky_inverse(lower)
    corner, side = _inverse_by_halves(matrix[:half, :half], failures), matrix[half:, :half]
    ratio = side @ corner
    rest = torch.addmm(matrix[half:, half:], ratio, side.T, alpha=-1)
    last = _inverse_by_halves(rest, failures)
    inverse, across = torch.empty_like(matrix), last @ ratio
    torch.addmm(corner, ratio.T, across, out=inverse[:half, :half])
    torch.neg(across, out=inverse[half:, :half])
    torch.neg(across.T, out=inverse[:half, half:])
    inverse[half:, half:] = last
    return inverse
