"""Mask and weights together: ADMM searches the mask, a joint solve gives the weights.

The layer-wise problem is split by the alternating direction method of multipliers, as ALPS does
(arXiv 2406.07831, section 3.1): ``B`` minimises the loss, ``D`` meets the pattern, and the scaled
dual ``Y`` drives them together while the penalty ρ grows::

    B = W + ρ (H + ρI)⁻¹ (D − Y − W),   B ← ωB + (1 − ω) D,   Z = B + Y
    D = the largest of Z that the pattern keeps,   Y = Z − D

Three things make it good in a few steps, on a matrix scaled half way between a unit diagonal and
one of its inverse (`DampedGram.balanced`): over-relaxation ω where steps are few; few penalties
with several steps each, since only a new penalty costs a factorisation; and restarts. At a fixed
point ``ρY = (W − D) H`` outside the mask, so that any solved mask is a warm start: a round begins
at the weights of the round before, and its result is kept where it is better. More rounds, hence
more effort, never return a worse layer.

A step costs one product of (in, in) by (in, out) and an estimated threshold; only a round's last
mask is counted exactly. The product is bf16 where that pays (`Scaled.proximal`): the search
forgives what the joint solve would not.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from apt.solver.gram import DampedGram, Gram, SolverError
from apt.solver.least_squares import Joint, joint_weights
from apt.solver.options import Effort, Solution, SolverOptions
from apt.solver.patterns import NM, Pattern, about_highest, lowest
from apt.solver.precision import full_precision


@dataclass(frozen=True)
class Round:
    """One descent from small penalties to large ones.

    Args:
        penalties: ρ, where the eigenvalues have a geometric mean of 1.
        steps: the steps at each penalty.
        relaxation: ω, between 1 (none) and 2.
        tolerance: where the joint solve that ends the round stops, at the earliest.
    """

    penalties: tuple[float, ...]
    steps: int
    relaxation: float = 1.0
    tolerance: float = 1e-3


_FIRST_DUAL = 0.5
"""What the first dual is, of what was pruned: a part of the fixed point's with the identity for H,
worth half a step and nearly free."""

_FIRST = Round((1.2,), 4, 1.8, 0.3)
_SECOND = Round((0.5, 0.66, 0.86, 1.1, 1.4), 6)
_LONG = Round((0.5, 0.6, 0.7, 0.8, 0.95, 1.1, 1.3), 6)
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
    """Search the mask by rounds of ADMM, as many as ``options.effort`` allows; see the module.

    Args:
        weight: the dense ``W`` (out, in).
        gram: the Gram matrix of its inputs.
        pattern: what the mask must meet.
        options: effort, damping and tolerance.
        start: a mask (out, in) that meets the pattern, from wherever: the result is never worse
            than the best weights for it.

    Raises:
        SolverError: the pattern does not divide the width, the effort is unknown, or the Gram
            matrix is unusable.
    """
    if isinstance(pattern, NM) and weight.shape[1] % pattern.m:
        raise SolverError(f"the input width {weight.shape[1]} is not a multiple of {pattern.m}")
    if options.effort not in ROUNDS:
        raise SolverError(f"effort '{options.effort}' is none of {', '.join(ROUNDS)}")
    damped = gram.damped(options.damping)
    dense = weight.to(damped.matrix.dtype)
    best = None if start is None else joint_weights(dense, damped, start, None, options.tolerance)
    for part in ROUNDS[options.effort]:
        mask, start = _search(dense, damped, pattern, part, best)
        tolerance = max(options.tolerance, part.tolerance)
        found = joint_weights(dense, damped, mask, start, tolerance)
        best = found if best is None else _better(best, found, pattern)
    assert best is not None
    return Solution(best.weight.to(weight.dtype), best.mask, damped.damping, best.residual)


def _search(
    dense: Tensor, damped: DampedGram, pattern: Pattern, part: Round, best: Joint | None
) -> tuple[Tensor, Tensor]:
    """One round: its mask, and weights to start the joint solve from, both (out, in).

    All is held transposed, (in, out): a group of n:m is then a few contiguous rows.
    """
    scaled = damped.balanced
    target = (dense * scaled.scale).T.contiguous()
    if best is None:
        kept, spare = torch.empty_like(target), torch.empty_like(target)
        _keep(target, pattern, kept, spare)
        dual = (target - kept).mul_(_FIRST_DUAL)
    else:
        kept = (best.weight * scaled.scale).T.contiguous()
        spare = target - kept
        dual = scaled.matrix @ spare
        dual.mul_(kept == 0).div_(part.penalties[0])
    penalty, mixed = part.penalties[0], torch.empty_like(target)
    for following in part.penalties:
        proximal = scaled.proximal(following)
        dual.mul_(penalty / following)
        penalty = following
        for _ in range(part.steps):
            torch.sub(kept, dual, out=spare).sub_(target)
            _add_product(target, proximal, spare, mixed)
            mixed.mul_(part.relaxation).add_(kept, alpha=1 - part.relaxation).add_(dual)
            _keep(mixed, pattern, kept, spare)
            torch.sub(mixed, kept, out=dual)
    magnitudes, start = mixed.T.contiguous().abs_(), kept.T.contiguous()
    return lowest(magnitudes, pattern), start.div_(scaled.scale)


def _add_product(target: Tensor, proximal: Tensor, spare: Tensor, out: Tensor) -> None:
    """``target + proximal spare`` to ``out``, all (in, out); see `Scaled.proximal` for its bits."""
    if proximal.dtype == spare.dtype:
        torch.addmm(target, proximal, spare, out=out)
    else:
        torch.add(target, proximal @ spare.to(proximal.dtype), out=out)


def _keep(values: Tensor, pattern: Pattern, kept: Tensor, spare: Tensor) -> None:
    """To ``kept`` goes ``values`` (in, out), zero but where about the largest of the pattern are.

    ``spare`` (in, out) is written over: pages of large new tensors cost more than what is done
    with them.
    """
    magnitudes = torch.abs(values, out=spare)
    threshold = about_highest(magnitudes, pattern)
    size = pattern.m if isinstance(pattern, NM) else len(values)
    magnitudes.view(-1, size, values.shape[1]).ge_(threshold)
    torch.mul(values, magnitudes, out=kept)


def _better(best: Joint, found: Joint, pattern: Pattern) -> Joint:
    """The better of two solutions: row by row where every row meets the pattern by itself."""
    gained = found.loss < best.loss
    if not isinstance(pattern, NM) and pattern.per != "row":
        return found if float(found.loss.sum()) < float(best.loss.sum()) else best
    rows = gained.unsqueeze(1)
    return Joint(
        torch.where(rows, found.weight, best.weight),
        torch.where(rows, found.mask, best.mask),
        torch.minimum(found.loss, best.loss),
        max(found.residual, best.residual),
    )
