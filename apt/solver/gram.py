"""Gram matrices of a layer's inputs, damped and factorised.

The layer-wise objective ``‖X Wᵀ − X Vᵀ‖²`` is quadratic in each row of ``V``, and its Hessian is
``2 XᵀX``, the same for every row. The Gram matrix ``XᵀX`` is therefore, up to the factor 2, the
Hessian ``H`` of SparseGPT, GPTQ and OBS. The factor does not matter, since damping is relative and
the solution is invariant to the scale of ``H``. `DampedGram` holds this ``H``, divided by the count
of tokens and damped.
"""

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from apt.solver.precision import full_precision
from apt.solver.scaled import Scaled

DAMPING = 0.01

_PROBES = 64  # random vectors that estimate the diagonal of an inverse
_PANEL = 192  # columns per product: the sum is symmetric, so rows below the panel are skipped


class SolverError(ValueError):
    """A layer cannot be solved with these options; the message gives the reason."""


class Gram:
    """The sum ``XᵀX`` over tokens, with their count and sum: SparseGPT's Hessian, up to a factor.

    Attributes:
        tokens: the number of tokens.
        total: the sum of the tokens (in,).
        sample: the number of tokens in a calibration sample.

    Args:
        width: the number of input features.
        device, dtype: the device and the precision of the sum; fp32 except in tests.
    """

    def __init__(
        self, width: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.tokens = self.sample = 0
        self.total = torch.zeros(width, device=device, dtype=dtype)
        # The sums of squares around the mean of each sample.
        self._deviations = torch.zeros(width, device=device, dtype=dtype)
        self._sum = torch.zeros(width, width, device=device, dtype=dtype)
        self._symmetric = True
        self._damped: dict[float, DampedGram] = {}
        self._live: Gram | None = None

    @classmethod
    def of(cls, inputs: Tensor) -> "Gram":
        """The Gram matrix of ``inputs`` (..., tokens, in), in their own precision, at least fp32.

        Each (tokens, in) is one calibration sample.
        """
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        gram = cls(inputs.shape[-1], inputs.device, dtype)
        gram.add(inputs)
        return gram

    @classmethod
    def from_sum(cls, matrix: Tensor, tokens: int, total: Tensor | None = None) -> "Gram":
        """A Gram matrix of one calibration sample, which was summed elsewhere.

        Args:
            matrix: ``XᵀX`` (in, in).
            tokens: the number of tokens.
            total: the sum of the tokens (in,); zero by default.
        """
        gram = cls(len(matrix), matrix.device, matrix.dtype)
        gram._sum, gram.tokens, gram.sample = matrix.clone(), tokens, tokens
        if total is not None:
            gram.total += total
        gram._deviations += matrix.diagonal() - gram.total.square() / max(tokens, 1)
        return gram

    @full_precision()
    def add(self, inputs: Tensor, sample: int | None = None) -> None:
        """Add the tokens ``inputs`` (..., tokens, in).

        Args:
            inputs: the tokens, one sample after another.
            sample: the number of tokens in a sample; by default the last dimension but one.
        """
        rows = inputs.reshape(-1, inputs.shape[-1]).to(self._sum.dtype)
        self.sample = sample or inputs.shape[-2]
        for part in torch.split(rows, max(self.sample, 1)):
            self._deviations += (part - part.mean(0)).square_().sum(0)
        for start in range(0, self.width, _PANEL):
            panel, upper = slice(start, start + _PANEL), slice(0, start + _PANEL)
            self._sum[upper, panel].addmm_(rows[:, upper].T, rows[:, panel])
        self.total += rows.sum(0)
        self.tokens += rows.shape[0]
        self._symmetric = False
        self._damped.clear()
        self._live = None

    def check(self) -> None:
        """Raise if the inputs do not determine a solution.

        Raises:
            SolverError: no token was added, all inputs are zero, or some are not finite.
        """
        if not self.tokens or float(self.matrix.diagonal().mean()) == 0:
            raise SolverError("the layer's input was zero on all calibration tokens")
        self.check_finite()

    def check_finite(self) -> None:
        """Raise `SolverError` if some inputs are not finite."""
        if not torch.isfinite(self.matrix).all():
            raise SolverError("the layer's input is not finite on some calibration tokens")

    def with_missing_tokens(self, mean: float) -> "Gram":
        """A Gram matrix of at least as many tokens as inputs.

        If tokens are missing, isotropic ones are added: their mean square is ``mean`` in every
        direction. A weight that received no token at all is then pruned by magnitude.
        """
        missing = max(0, self.width - self.tokens)
        gram = self._restricted(self.matrix, slice(None))
        gram.matrix.diagonal().add_(missing * mean)
        gram._deviations += missing * mean
        gram.tokens += missing
        return gram

    @property
    def variance(self) -> Tensor:
        """The variance of each input within a sample, as the mean over the samples (in,)."""
        return self._deviations.clamp_min(0) / max(self.tokens, 1)

    @property
    def dead(self) -> Tensor:
        """True for the inputs that were zero on all tokens (in,)."""
        return self.matrix.diagonal() == 0

    @property
    def live(self) -> "Gram":
        """The Gram matrix of the inputs that are not `dead`, computed once for all its sites."""
        if self._live is None:
            live = ~self.dead
            self._live = self._restricted(self.matrix[live][:, live], live)
        return self._live

    def _restricted(self, matrix: Tensor, inputs: Tensor | slice) -> "Gram":
        """The Gram matrix ``matrix`` of the same tokens, for the inputs with these indices."""
        gram = Gram.from_sum(matrix, self.tokens, self.total[inputs])
        gram._deviations, gram.sample = self._deviations[inputs].clone(), self.sample
        return gram

    def add_up(self, add: Callable[..., None], tokens: int) -> None:
        """Add the sums of other processes, in place.

        Args:
            add: a function that adds the tensors of the other processes to its arguments, in place.
            tokens: the number of tokens of all processes.
        """
        add(self.matrix, self.total, self._deviations)
        self.tokens = tokens
        self._damped.clear()
        self._live = None

    @property
    def width(self) -> int:
        """The number of input features."""
        return len(self._sum)

    @property
    def matrix(self) -> Tensor:
        """``XᵀX`` (in, in)."""
        if not self._symmetric:
            self._sum.triu_().add_(self._sum.triu(1).T)
            self._symmetric = True
        return self._sum

    def damped(self, damping: float | None = None) -> "DampedGram":
        """``H = XᵀX / tokens + λI``, factorised; computed once for each ``damping``.

        Args:
            damping: λ as a share of the mean diagonal; `DAMPING` by default.

        Raises:
            SolverError: no token was added, all inputs are zero, some are not finite, or the
                matrix is not positive definite at any damping.
        """
        damping = DAMPING if damping is None else damping
        if damping not in self._damped:
            self._damped[damping] = DampedGram.factorise(self, damping)
        return self._damped[damping]


class DampedGram:
    """``H = XᵀX / tokens + λI`` with ``λ = damping · mean(diag XᵀX / tokens)``, factorised.

    Attributes:
        matrix: ``H`` (in, in).
        damping: the damping that the factorisation needed, at least the requested one.
    """

    def __init__(self, matrix: Tensor, root: Tensor, damping: float) -> None:
        self.matrix, self.damping = matrix, damping
        self._root = root

    @cached_property
    def factor(self) -> Tensor:
        """The upper triangular ``U`` (in, in) with ``UᵀU = H⁻¹``.

        For the columns F = {i, i+1, …} not yet frozen, ``[H_FF]⁻¹ = U_FFᵀ U_FF``. It is the inverse
        of the upper triangular ``R`` with ``H = R Rᵀ``. This takes one factorisation; inverting
        first and factorising the inverse would take two.
        """
        eye = torch.eye(len(self.matrix), dtype=self.matrix.dtype, device=self.matrix.device)
        inverse: Tensor = torch.linalg.solve_triangular(self._root, eye, upper=True)
        return inverse

    @property
    def inverse(self) -> Tensor:
        """``H⁻¹`` (in, in), from the factor: `positive_inverse` is faster and less accurate.

        The inputs of most language models share one large direction. With such inputs
        `positive_inverse` loses two more digits, or fails.
        """
        return self.factor.T @ self.factor

    @cached_property
    def unit(self) -> "Scaled":
        """``H`` scaled to a unit diagonal, on which conjugate gradients converge fastest."""
        scale = self.matrix.diagonal().sqrt()
        return Scaled(scale, self.matrix / scale / scale.unsqueeze(1))

    @cached_property
    def balanced(self) -> "Scaled":
        """``H`` scaled halfway between a unit diagonal and a unit diagonal of its inverse.

        With a unit diagonal, the squared magnitude of a weight is the loss of its removal without
        compensation; with a unit diagonal of the inverse, it is the loss with compensation by all
        other weights. Under a mask, some of the weights compensate, so magnitudes halfway between
        rank the weights best. The determinant is 1, so that 1 is the natural unit of a penalty for
        all layers: for nearly independent inputs, and for the far more dependent inputs of an
        attention's output projection. The diagonal of the inverse is ``E (R⁻ᵀz)²`` over
        random ``z``. 64 random vectors estimate its fourth root to 4 %, in a fraction of the time
        of the factor.
        """
        width, generator = len(self.matrix), torch.Generator().manual_seed(0)
        exact = width <= _PROBES
        probes = (
            torch.eye(width, dtype=torch.float32, device="cpu")
            if exact
            else torch.randn(width, _PROBES, generator=generator, dtype=torch.float32, device="cpu")
        )
        solved = torch.linalg.solve_triangular(self._root.T, probes.to(self.matrix), upper=False)
        inverse = solved.square().mean(1)  # up to a factor, which the unit determinant removes
        scale = _fourth_root(self.matrix.diagonal(), inverse)
        scale *= (self._root.diagonal().log().mean() - scale.log().mean()).exp()
        return Scaled(scale, self.matrix / scale / scale.unsqueeze(1))

    @full_precision()
    def solve(self, rows: Tensor) -> Tensor:
        """``rows H⁻¹`` for ``rows`` (n, in)."""
        half = torch.linalg.solve_triangular(self._root, rows.T, upper=True)
        solution: Tensor = torch.linalg.solve_triangular(self._root.T, half, upper=False)
        return solution.T

    @classmethod
    @full_precision()
    def factorise(cls, gram: Gram, damping: float) -> "DampedGram":
        """Factorise with the least damping and precision that succeed; see `Gram.damped`."""
        gram.check()
        mean = gram.matrix / gram.tokens
        scale = float(mean.diagonal().mean())
        for dtype, level in _attempts(mean.dtype, damping):
            matrix = mean.to(dtype, copy=True)
            matrix.diagonal().add_(level * scale)
            root = upper_root(matrix)
            if root is not None:
                return cls(matrix, root, level)
        raise SolverError(
            f"the Gram matrix is not positive definite, even with damping {level:g} in fp64"
        )


def _fourth_root(numerator: Tensor, denominator: Tensor) -> Tensor:
    """``(numerator / denominator)^¼``, also if the quotient overflows or underflows.

    The quotient is the fourth power of an input's size: inputs of 1e-12 or 1e10 exceed the range.
    """
    quotient, limits = numerator / denominator, torch.finfo(numerator.dtype)
    normal = (quotient >= limits.tiny) & (quotient <= limits.max)
    return torch.where(normal, quotient.pow(0.25), numerator.pow(0.25) / denominator.pow(0.25))


def _attempts(dtype: torch.dtype, damping: float) -> Iterator[tuple[torch.dtype, float]]:
    """The requested damping, then three tenfold increases; then all of them again in fp64."""
    levels = [damping, *(max(damping, 1e-3) * 10**power for power in (1, 2, 3))]
    for precision in dict.fromkeys((dtype, torch.float64)):
        yield from ((precision, level) for level in levels)


def upper_root(matrix: Tensor) -> Tensor | None:
    """The upper triangular ``R`` with ``matrix = R Rᵀ``; None if the matrix has no such root."""
    lower, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    safe = float(lower.diagonal().min()) > torch.finfo(matrix.dtype).tiny ** 0.5
    return lower.flip(0, 1) if not int(info) and safe else None
