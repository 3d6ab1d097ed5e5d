"""Gram matrices of a layer's inputs, damped and factorised.

The layer-wise objective ``‖X Wᵀ − X Vᵀ‖²`` is quadratic in each row of ``V``, and its Hessian is
``2 XᵀX``, the same for every row. The Gram matrix ``XᵀX`` is therefore, up to the factor 2, the
Hessian ``H`` of SparseGPT, GPTQ and OBS. The factor does not matter, since damping is relative and
the solution is invariant to the scale of ``H``. `DampedGram` holds this ``H``, divided by the count
of tokens and damped.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from apt.devices import multiplies_bf16
from apt.solver.precision import full_precision

DAMPING = 0.01
OUTLIERS = 8  # directions in which activations are far larger than elsewhere

_CACHE = 2**29  # bytes of the inverses kept for each Gram matrix: two of 11,008 inputs in bf16
_PROBES = 64  # random vectors that estimate the diagonal of an inverse
_PANEL = 192  # columns per product: the sum is symmetric, so rows below the panel are skipped
_LEAF = 128  # smaller matrices are inverted without recursion
_BF16_WIDTH = 512  # inputs from which the speed of bf16 products outweighs their rounding errors
NODES = (0.6, 1.2)  # penalties of which the inverses are computed
_EXACT = (0.05, 0.9)  # eigenvalues for which the interpolation between the nodes has no error


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
        self._within = torch.zeros(width, device=device, dtype=dtype)
        self._sum = torch.zeros(width, width, device=device, dtype=dtype)
        self._mirrored = True
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
        gram._within += matrix.diagonal() - gram.total.square() / max(tokens, 1)
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
            self._within += (part - part.mean(0)).square_().sum(0)
        for start in range(0, self.width, _PANEL):
            here, above = slice(start, start + _PANEL), slice(0, start + _PANEL)
            self._sum[above, here].addmm_(rows[:, above].T, rows[:, here])
        self.total += rows.sum(0)
        self.tokens += rows.shape[0]
        self._mirrored = False
        self._damped.clear()
        self._live = None

    def check(self) -> None:
        """Raise if the inputs say nothing about the weights.

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
        gram = self._with(self.matrix, slice(None))
        gram.matrix.diagonal().add_(missing * mean)
        gram._within += missing * mean
        gram.tokens += missing
        return gram

    @property
    def variance(self) -> Tensor:
        """The variance of each input within a sample, as the mean over the samples (in,)."""
        return self._within.clamp_min(0) / max(self.tokens, 1)

    @property
    def dead(self) -> Tensor:
        """True for the inputs that were zero on all tokens (in,)."""
        return self.matrix.diagonal() == 0

    @property
    def live(self) -> "Gram":
        """The Gram matrix of the inputs that are not `dead`; kept for sites that share it."""
        if self._live is None:
            live = ~self.dead
            self._live = self._with(self.matrix[live][:, live], live)
        return self._live

    def _with(self, matrix: Tensor, inputs: Tensor | slice) -> "Gram":
        """A Gram matrix of the same tokens with this sum, for some of the inputs."""
        gram = Gram.from_sum(matrix, self.tokens, self.total[inputs])
        gram._within, gram.sample = self._within[inputs].clone(), self.sample
        return gram

    def add_up(self, add: Callable[..., None], tokens: int) -> None:
        """Add the sums of other processes, in place.

        Args:
            add: adds the tensors of the other processes to those that it gets, in place.
            tokens: the number of tokens of all processes.
        """
        add(self.matrix, self.total, self._within)
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
        if not self._mirrored:
            self._sum.triu_().add_(self._sum.triu(1).T)
            self._mirrored = True
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
        damping: the damping that was needed, at least the one asked for.
    """

    def __init__(self, matrix: Tensor, root: Tensor, damping: float) -> None:
        self.matrix, self.damping = matrix, damping
        self._root = root

    @cached_property
    def factor(self) -> Tensor:
        """The upper triangular ``U`` (in, in) with ``UᵀU = H⁻¹``.

        For the columns F = {i, i+1, …} not yet frozen, ``[H_FF]⁻¹ = U_FFᵀ U_FF``. It is the inverse
        of the upper triangular ``R`` with ``H = R Rᵀ``: one factorisation, where inverting first
        and factorising the inverse takes two.
        """
        eye = torch.eye(len(self.matrix), dtype=self.matrix.dtype, device=self.matrix.device)
        inverse: Tensor = torch.linalg.solve_triangular(self._root, eye, upper=True)
        return inverse

    @property
    def inverse(self) -> Tensor:
        """``H⁻¹`` (in, in), from the factor: `positive_inverse` is faster and less accurate.

        With inputs that share one large direction, as those of most language models, the latter
        loses two more digits, or fails.
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
        all layers: for nearly independent inputs, and for inputs of an attention's output
        projection, which are far more dependent. The diagonal of the inverse is ``E (R⁻ᵀz)²`` over
        random ``z``: 64 of them estimate its fourth root to 4 %, in a fraction of the time that the
        factor takes.
        """
        width, generator = len(self.matrix), torch.Generator().manual_seed(0)
        exact = width <= _PROBES
        probes = (
            torch.eye(width, device="cpu")
            if exact
            else torch.randn(width, _PROBES, generator=generator, device="cpu")
        )
        solved = torch.linalg.solve_triangular(self._root.T, probes.to(self.matrix), upper=False)
        inverse = solved.square().mean(1)  # up to a factor, which the unit determinant removes
        scale = (self.matrix.diagonal() / inverse).pow(0.25)
        scale *= (self._root.diagonal().log().mean() - scale.log().mean()).exp()
        return Scaled(scale, self.matrix / scale / scale.unsqueeze(1))

    @full_precision()
    def solve(self, rows: Tensor) -> Tensor:
        """``rows H⁻¹`` for ``rows`` (n, in)."""
        half = torch.linalg.solve_triangular(self._root, rows.T, upper=True)
        whole: Tensor = torch.linalg.solve_triangular(self._root.T, half, upper=False)
        return whole.T

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


class Scaled:
    """``S⁻¹ H S⁻¹`` (in, in) for a diagonal ``S``, ``scale`` (in,); weights scale as ``W S``."""

    def __init__(self, scale: Tensor, matrix: Tensor) -> None:
        self.scale, self.matrix = scale, matrix
        self._cached: dict[float, Tensor] = {}

    @cached_property
    def outliers(self) -> tuple[Tensor, Tensor]:
        """The largest eigenvalues (count,), about, and their eigenvectors (in, count)."""
        count = max(1, min(OUTLIERS, len(self.matrix) // 8))
        generator = torch.Generator().manual_seed(0)
        basis = torch.randn(len(self.matrix), count, generator=generator, device="cpu")
        basis = basis.to(self.matrix)
        for _ in range(5):
            basis = torch.linalg.qr(self.matrix @ basis).Q
        values, rotation = torch.linalg.eigh(basis.T @ self.matrix @ basis)
        return values, basis @ rotation

    def proximals(self, penalties: Iterable[float]) -> Iterator[Tensor]:
        """``ρ (H + ρI)⁻¹`` of the scaled matrix (in, in) for each penalty ρ, about.

        Inverses are computed for two penalties. For all others, a weighted sum of both serves
        (`_shares`). Between 0.5 and 1.4, and for every eigenvalue of H, it differs from the exact
        operator by less than 0.007, where its eigenvalues are between 0 and 1: about as much as
        bf16 rounds. They tolerate a low precision for the same reason. The matrices are in bf16 if
        the machine multiplies bf16 faster and the matrix is large, unless it is in fp64.

        A matrix is overwritten when the next one is asked for. Sites that share an input need the
        same inverses, so these are cached, up to `_CACHE` bytes.
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
        wide = len(inverse) >= _BF16_WIDTH and inverse.dtype == torch.float32
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


def _attempts(dtype: torch.dtype, damping: float) -> Iterator[tuple[torch.dtype, float]]:
    """The requested damping, then three tenfold increases; then all of them again in fp64."""
    levels = [damping, *(max(damping, 1e-3) * 10**power for power in (1, 2, 3))]
    for precision in dict.fromkeys((dtype, torch.float64)):
        yield from ((precision, level) for level in levels)


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
    if not bool(torch.stack(failures).any()):  # to ask after each part would wait for a device
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


def upper_root(matrix: Tensor) -> Tensor | None:
    """The upper triangular ``R`` with ``matrix = R Rᵀ``; None if the matrix has no such root."""
    lower, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    safe = float(lower.diagonal().min()) > torch.finfo(matrix.dtype).tiny ** 0.5
    return lower.flip(0, 1) if not int(info) and safe else None
