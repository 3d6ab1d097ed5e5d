"""Search for the mask by ADMM; a joint solve then computes the weights.

The layer-wise problem is split by the alternating direction method of multipliers, as ALPS does
(arXiv 2406.07831, section 3.1): ``B`` minimises the loss, ``D`` meets the pattern, and the scaled
dual variable ``Y`` drives both together while the penalty ρ grows::

    B = W + ρ (H + ρI)⁻¹ (D − Y − W),   B ← ωB + (1 − ω) D,   Z = B + Y
    D = Z with only the largest entries that the pattern keeps,   Y = Z − D

The search works on a matrix scaled halfway between a unit diagonal and a unit diagonal of its
inverse (`DampedGram.balanced`). Three measures make it converge in few steps: over-relaxation ω
where steps are few; penalties that grow with each step, at the price of two inverses
(`Scaled.proximals`); and restarts. At a fixed point ``ρY = (W − D) H`` outside the mask. So any
solved mask is a warm start: a round begins at the weights of the previous round, and its result is
kept if its loss is lower. More rounds, hence more effort, never return a worse layer.

A step costs one product of (in, in) by (in, out) and an estimated threshold. Only the last mask of
a round has the exact count. The product is in bf16 where bf16 is faster (`Scaled.proximals`):
the search tolerates its rounding errors, the joint solve would not.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from apt.patterns import Pattern
from apt.solver.gram import DampedGram, Gram, SolverError
from apt.solver.least_squares import Joint, joint_weights
from apt.solver.options import Effort, Solution, SolverOptions, check_fit
from apt.solver.precision import full_precision
from apt.solver.scaled import NODES


@dataclass(frozen=True)
class Round:
    """One run of ADMM, from small penalties to large ones.

    Args:
        penalties: ρ of each step, for eigenvalues with a geometric mean of 1.
        relaxation: ω, between 1 (none) and 2.
        slack: the tolerance of the joint solve at the end of the round, as a multiple of
            `SolverOptions.tolerance`.
    """

    penalties: tuple[float, ...]
    relaxation: float = 1.0
    slack: float = 1.0


_FIRST_DUAL = 0.5
"""The first dual variable, as a share of the pruned weights.

With the identity for H, the fixed point is a multiple of the pruned weights. This start saves about
half a step and costs almost nothing.
"""

_LOWEST, _HIGHEST = 0.5, 1.25


def _rising(steps: int) -> tuple[float, ...]:
    """Penalties in equal ratios."""
    return tuple(_LOWEST * (_HIGHEST / _LOWEST) ** (i / (steps - 1)) for i in range(steps))


_FIRST = Round((NODES[1],) * 4, 1.8, 300)
_SECOND = Round(_rising(16))
_LONG = Round(_rising(36))
ROUNDS: dict[Effort, tuple[Round, ...]] = {
    "fast": (_FIRST,),
    "default": (_FIRST, _SECOND),
    "best": (_FIRST, _SECOND, _LONG, _LONG),
}


@full_precision()
def admm(
    weight: Tensor,
    gram: Gram,
    pattern: Pattern,
    options: SolverOptions,
    start: Tensor | None = None,
) -> Solution:
    """Search for the mask by rounds of ADMM; ``options.effort`` sets their number.

    Args:
        weight: the dense ``W`` (out, in).
        gram: the Gram matrix of its inputs.
        pattern: the pattern of the mask.
        options: effort, damping and tolerance.
        start: a mask (out, in) that meets the pattern. The result is never worse than the best
            weights for this mask.

    Raises:
        SolverError: the pattern does not divide the width, the effort is unknown, or the Gram
            matrix is unusable.
    """
    check_fit(weight, pattern)
    if options.effort not in ROUNDS:
        raise SolverError(f"effort '{options.effort}' is none of {', '.join(ROUNDS)}")
    damped = gram.damped(options.damping)
    dense = weight.to(damped.matrix.dtype)
    best = None if start is None else joint_weights(dense, damped, start, None, options.tolerance)
    for round_ in ROUNDS[options.effort]:
        mask, start = _search(dense, damped, pattern, round_, best)
        candidate = joint_weights(dense, damped, mask, start, round_.slack * options.tolerance)
        best = candidate if best is None else _better(best, candidate, pattern)
    assert best is not None
    return Solution(best.weight.to(weight.dtype), best.mask, damped.damping, best.residual)


def _search(
    dense: Tensor, damped: DampedGram, pattern: Pattern, round_: Round, best: Joint | None
) -> tuple[Tensor, Tensor]:
    """One round: returns its mask, and the start of the joint solve, both (out, in).

    Inside, all matrices are transposed, (in, out), so that a group of n:m is a few contiguous rows.
    """
    scaled = damped.balanced
    target = (dense * scaled.scale).T.contiguous()
    if best is None:
        kept, buffer = torch.empty_like(target), torch.empty_like(target)
        _keep(target, pattern, kept, buffer)
        dual = (target - kept).mul_(_FIRST_DUAL)
    else:
        kept = (best.weight * scaled.scale).T.contiguous()
        buffer = target - kept
        dual = scaled.matrix @ buffer
        dual.mul_(kept == 0).div_(round_.penalties[0])
    penalty, mixed = round_.penalties[0], torch.empty_like(target)
    proximals = scaled.proximals(round_.penalties)
    for next_penalty, proximal in zip(round_.penalties, proximals, strict=True):
        if next_penalty != penalty:
            dual.mul_(penalty / next_penalty)
            penalty = next_penalty
        torch.sub(kept, dual, out=buffer).sub_(target)
        _add_product(target, proximal, buffer, mixed)
        if round_.relaxation != 1:
            mixed.mul_(round_.relaxation).add_(kept, alpha=1 - round_.relaxation)
        mixed.add_(dual)
        _keep(mixed, pattern, kept, buffer)
        torch.sub(mixed, kept, out=dual)
    magnitudes, start = mixed.T.contiguous().abs_(), kept.T.contiguous()
    return pattern.smallest(magnitudes), start.div_(scaled.scale)


def _add_product(target: Tensor, proximal: Tensor, values: Tensor, out: Tensor) -> None:
    """Write ``target + proximal values`` (in, out) to ``out``; ``proximal`` may be in bf16."""
    if proximal.dtype == values.dtype:
        torch.addmm(target, proximal, values, out=out)
    else:
        torch.add(target, proximal @ values.to(proximal.dtype), out=out)


def _keep(values: Tensor, pattern: Pattern, kept: Tensor, buffer: Tensor) -> None:
    """Write ``values`` (in, out) to ``kept``, with zeros where the pattern prunes.

    The count of zeros is approximate, see `Pattern.keep_largest`. ``buffer`` (in, out) is
    overwritten, because allocating a large tensor takes longer than the computation.
    """
    magnitudes = torch.abs(values, out=buffer)
    pattern.keep_largest(magnitudes)
    torch.mul(values, magnitudes, out=kept)


def _better(best: Joint, candidate: Joint, pattern: Pattern) -> Joint:
    """The better of two solutions, row by row if each row on its own meets the pattern."""
    improved = candidate.loss < best.loss
    if not pattern.by_row:
        return candidate if float(candidate.loss.sum()) < float(best.loss.sum()) else best
    rows = improved.unsqueeze(1)
    return Joint(
        torch.where(rows, candidate.weight, best.weight),
        torch.where(rows, candidate.mask, best.mask),
        torch.minimum(candidate.loss, best.loss),
        max(candidate.residual, best.residual),
    )
