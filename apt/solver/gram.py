"""Gram matrices of a layer's input, damped and factorised."""

from collections.abc import Iterator

import torch
from torch import Tensor

from apt.solver.precision import full_precision

_PANEL = 192  # columns summed together: the product is symmetric, so what is below them is not


class SolverError(ValueError):
    """A layer cannot be solved as asked; the message says why."""


class Gram:
    """The sum ``XᵀX`` over tokens, with their count.

    Args:
        width: the number of input features.
        device, dtype: where and in what the sum is held; fp32 unless a test asks for more.
    """

    def __init__(
        self, width: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.tokens = 0
        self._sum = torch.zeros(width, width, device=device, dtype=dtype)
        self._mirrored = True
        self._damped: dict[float, DampedGram] = {}

    @classmethod
    def of(cls, inputs: Tensor) -> "Gram":
        """The Gram matrix of ``inputs`` (..., in), in their own precision but at least fp32."""
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        gram = cls(inputs.shape[-1], inputs.device, dtype)
        gram.add(inputs)
        return gram

    @classmethod
    def from_sum(cls, matrix: Tensor, tokens: int) -> "Gram":
        """A Gram matrix that was summed elsewhere: ``XᵀX`` (in, in) over ``tokens`` tokens."""
        gram = cls(len(matrix), matrix.device, matrix.dtype)
        gram._sum, gram.tokens = matrix.clone(), tokens
        return gram

    @full_precision()
    def add(self, inputs: Tensor) -> None:
        """Add the tokens ``inputs`` (..., in)."""
        rows = inputs.reshape(-1, inputs.shape[-1]).to(self._sum.dtype)
        for start in range(0, self.width, _PANEL):
            here, above = slice(start, start + _PANEL), slice(0, start + _PANEL)
            self._sum[above, here].addmm_(rows[:, above].T, rows[:, here])
        self.tokens += rows.shape[0]
        self._mirrored = False
        self._damped.clear()

    @property
    def width(self) -> int:
        """The number of input features."""
        return len(self._sum)

    @property
    def matrix(self) -> Tensor:
        """``XᵀX`` (in, in)."""
        if not self._mirrored:
            self._sum.triu_().add_(self._sum.triu(1).T)
            self._mirrored = True
        return self._sum

    def damped(self, damping: float) -> "DampedGram":
        """``H = XᵀX / tokens + λI``, factorised; computed once for each ``damping``.

        Raises:
            SolverError: no token was added, all inputs are zero, some are not finite, or no
                damping made the matrix positive definite.
        """
        if damping not in self._damped:
            self._damped[damping] = DampedGram.factorise(self, damping)
        return self._damped[damping]


class DampedGram:
    """``H = XᵀX / tokens + λI`` with ``λ = damping · mean(diag XᵀX / tokens)``, and its factor.

    Attributes:
        matrix: ``H`` (in, in).
        factor: the upper triangular ``U`` (in, in) with ``UᵀU = H⁻¹``. For the columns
            F = {i, i+1, …} not yet frozen, ``[H_FF]⁻¹ = U_FFᵀ U_FF``.
        damping: the damping that was needed, at least the one asked for.
    """

    def __init__(self, matrix: Tensor, factor: Tensor, damping: float) -> None:
        self.matrix, self.factor, self.damping = matrix, factor, damping

    @classmethod
    @full_precision()
    def factorise(cls, gram: Gram, damping: float) -> "DampedGram":
        """Factorise with the least damping and precision that works; see `Gram.damped`."""
        mean = gram.matrix / max(gram.tokens, 1)
        scale = float(mean.diagonal().mean())
        if not gram.tokens or scale == 0:
            raise SolverError("the layer's input was zero on all calibration tokens")
        if not torch.isfinite(mean).all():
            raise SolverError("the layer's input is not finite on some calibration tokens")
        for dtype, level in _attempts(mean.dtype, damping):
            matrix = mean.to(dtype, copy=True)
            matrix.diagonal().add_(level * scale)
            factor = inverse_factor(matrix)
            if factor is not None:
                return cls(matrix, factor, level)
        raise SolverError(
            f"the Gram matrix is not positive definite, even with damping {level:g} in fp64"
        )


def _attempts(dtype: torch.dtype, damping: float) -> Iterator[tuple[torch.dtype, float]]:
    """The damping asked for, three times ten times as much, then all of it again in fp64."""
    levels = [damping, *(max(damping, 1e-3) * 10**power for power in (1, 2, 3))]
    for precision in dict.fromkeys((dtype, torch.float64)):
        yield from ((precision, level) for level in levels)


def inverse_factor(matrix: Tensor) -> Tensor | None:
    """The upper triangular ``U`` with ``UᵀU = matrix⁻¹``, or None where there is none.

    Reversing the order of rows and columns turns the lower Cholesky factor into an upper one:
    ``matrix = R Rᵀ`` with ``R`` upper triangular, hence ``matrix⁻¹ = R⁻ᵀ R⁻¹`` and ``U = R⁻¹``.
    That takes one factorisation where inverting first and factorising the inverse takes two.
    """
    lower, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if int(info):
        return None
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    factor = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
    return factor if bool(torch.isfinite(factor).all()) else None
