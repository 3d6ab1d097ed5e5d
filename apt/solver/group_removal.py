"""The removal of whole groups of input columns: the multiple removal problem with one mask.

If all rows of a weight lose the same columns ``P``, the closed form of arXiv 2410.15567 needs one
factorisation for all rows. The best weights of the kept columns are
``V_K = W_K + W_P H_PK H_KK⁻¹``, and the loss is ``½ tr(W_P ([H⁻¹]_PP)⁻¹ W_Pᵀ)``. A group of columns
is, for instance, a channel of an MLP or the outputs of an attention head: without them, the model
has a smaller dense weight.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from apt.patterns import ColumnGroups
from apt.solver.gram import DampedGram, Gram
from apt.solver.options import MethodError, Solution, SolverOptions, check_tensor
from apt.solver.precision import full_precision

# The greedy removal of many groups removes several in a step. On MLPs of SmolLM2 (384 of 1536
# columns), 32 steps end with the same loss as single removals, within 0.1 %.
_STEPS = 32


class GroupChoice(Protocol):
    """A function that chooses groups of columns of one weight."""

    def __call__(
        self, weight: Tensor, gram: Gram, groups: ColumnGroups, options: SolverOptions, /
    ) -> Tensor:
        """Choose groups to remove, as many from each bin.

        Args:
            weight: the weight (out, in) in fp32.
            gram: the Gram matrix of its inputs (in, in).
            groups: the groups of its columns, see `ColumnGroups.lowest`.
            options: the damping.

        Returns:
            The mask (count,) of the groups to remove.
        """


@dataclass(frozen=True)
class GroupRemoval:
    """A method that removes groups of columns, in the form of a pruning method.

    Args:
        choose: the choice of the groups, if the pattern does not give them.
        compensate: True for exact least-squares weights of the kept columns; False keeps them as
            they are.
    """

    choose: GroupChoice
    compensate: bool = True

    def __call__(
        self, weight: Tensor, gram: Gram, groups: ColumnGroups, options: SolverOptions
    ) -> Solution:
        """Remove groups. If the pattern removes no group, the weight does not change.

        Raises:
            MethodError: ``choose`` does not return the mask of the groups to remove.
        """
        if not groups.removed:
            return Solution(weight.clone(), torch.zeros_like(weight, dtype=torch.bool), None)
        if groups.chosen is None:
            removed = self.choose(weight, gram, groups, options)
            check_removed(removed, groups)
        else:
            removed = groups.mask(groups.chosen)
        columns = groups.columns(removed.to(weight.device), weight.shape[1])
        if self.compensate:
            return keep_columns(weight, gram.damped(options.damping), columns)
        mask = columns.expand_as(weight).clone()
        return Solution(weight.masked_fill(mask, 0), mask, None)


def check_removed(mask: Tensor, groups: ColumnGroups) -> None:
    """Raise `MethodError` unless a choice returned the mask of the groups to remove."""
    check_tensor(mask, "a mask of groups", torch.Size([groups.count]), torch.bool)
    counts, expected = mask.view(groups.bins, -1).sum(1).tolist(), groups.removed // groups.bins
    if set(counts) != {expected}:
        bins = f"in {groups.bins} bins, not {expected} in each" if groups.bins > 1 else ""
        removed = ", ".join(map(str, counts))
        raise MethodError(f"removes {removed} groups {bins or f'instead of {expected}'}")


@full_precision()
def joint_removal(
    weight: Tensor, gram: Gram, groups: ColumnGroups, options: SolverOptions
) -> Tensor:
    """The groups to remove, chosen greedily by their joint loss.

    Each step removes the groups of least loss, given all earlier removals, and compensates in all
    remaining columns, as OBS does with single weights.

    Args:
        weight: the dense ``W`` (out, in).
        gram: the Gram matrix of its inputs (in, in).
        groups: the groups, and the number that is kept.
        options: the damping; nothing else is used.

    Returns:
        The mask (count,) of the removed groups.

    Raises:
        ValueError: the inputs are not a multiple of the number of groups.
        SolverError: the Gram matrix has no factorisation, see `Gram.damped`.
    """
    return groups.mask(removal_order(weight, gram, groups, options)[: groups.removed])


@full_precision()
def removal_order(
    weight: Tensor, gram: Gram, groups: ColumnGroups, options: SolverOptions
) -> Tensor:
    """The order in which `joint_removal` removes groups, from the first to the last.

    A prefix of the order has the same number of groups from each bin if its length is a multiple of
    the number of bins. The arguments and errors are those of `joint_removal`.

    Returns:
        The indices of ``groups.removed`` groups.
    """
    removed = groups.mask(()).to(weight.device)
    groups.columns(removed, weight.shape[1])  # raises if the groups do not fit
    damped = gram.damped(options.damping)
    search, order = _GreedyRemoval(weight.to(damped.matrix.dtype), damped, groups), list[Tensor]()
    while (remaining := groups.removed - int(search.removed.sum())) > 0:
        order.append(search.cheapest(min(remaining, math.ceil(groups.removed / _STEPS))))
        search.remove(order[-1])
    return torch.cat([torch.zeros(0, dtype=torch.long), *(part.cpu() for part in order)])


@full_precision()
def keep_columns(weight: Tensor, damped: DampedGram, removed: Tensor) -> Solution:
    """The exact least-squares weights on the kept columns.

    Args:
        weight: the dense ``W`` (out, in).
        damped: the damped Gram matrix ``H`` (in, in).
        removed: True for the columns that are removed (in,).
    """
    dense, matrix, keep = weight.to(damped.matrix.dtype), damped.matrix, ~removed
    root = torch.linalg.cholesky(matrix[keep][:, keep])
    lost = dense[:, removed] @ matrix[removed][:, keep]
    solution = torch.zeros_like(dense)
    solution[:, keep] = dense[:, keep] + torch.cholesky_solve(lost.T, root).T
    mask = removed.expand_as(dense).clone()
    return Solution(solution.to(weight.dtype), mask, damped.damping)


@full_precision()
def removal_loss(weight: Tensor, damped: DampedGram, removed: Tensor) -> float:
    """``½ tr(W_P ([H⁻¹]_PP)⁻¹ W_Pᵀ)``, the least loss of a removal of columns.

    Args:
        weight: the dense ``W`` (out, in).
        damped: the damped Gram matrix ``H`` (in, in), of the mean token.
        removed: True for the columns that are removed (in,).
    """
    lost = weight[:, removed].to(damped.matrix.dtype)
    root = torch.linalg.cholesky(damped.inverse[removed][:, removed])
    return float(torch.linalg.solve_triangular(root, lost.T, upper=False).square().sum()) / 2


class _GreedyRemoval:
    """The state of a greedy removal; ``removed`` (count,) is the mask of the removed groups."""

    def __init__(self, weight: Tensor, damped: DampedGram, groups: ColumnGroups) -> None:
        self._groups = groups
        self._weight, self._inverse = weight.clone(), damped.inverse
        self.removed = torch.zeros(groups.count, dtype=torch.bool, device=weight.device)
        self._columns = torch.arange(weight.shape[1], device=weight.device)

    def cheapest(self, count: int) -> Tensor:
        """The indices of about ``count`` groups of least loss, the same number from each bin."""
        groups = self._groups
        losses = self._losses().masked_fill(self.removed, math.inf).view(groups.bins, -1)
        per_bin = math.ceil(count / groups.bins)
        chosen = losses.topk(per_bin, dim=1, largest=False).indices
        bin_starts = torch.arange(groups.bins, device=chosen.device) * (groups.count // groups.bins)
        return (chosen + bin_starts.unsqueeze(1)).T.flatten()

    def _losses(self) -> Tensor:
        """The loss of the removal of each group by itself, up to a factor (count,)."""
        parts = self._weight.view(len(self._weight), self._groups.count, -1)
        size = parts.shape[2]
        if size == 1:
            diagonal = self._inverse.diagonal().masked_fill(self.removed, 1)
            losses: Tensor = parts.square().sum((0, 2)) / diagonal
            return losses
        blocks = self._inverse.view(len(parts[0]), size, -1, size).diagonal(dim1=0, dim2=2)
        blocks = blocks.permute(2, 0, 1).clone()
        blocks[self.removed] = torch.eye(size, dtype=blocks.dtype, device=blocks.device)
        roots, lost = torch.linalg.cholesky(blocks), parts.permute(1, 2, 0)
        solved: Tensor = torch.linalg.solve_triangular(roots, lost, upper=False)
        return solved.square().sum((1, 2))

    def remove(self, chosen: Tensor) -> None:
        """Remove groups, and compensate in all remaining columns."""
        mask = torch.zeros_like(self.removed)
        mask[chosen] = True
        columns = self._columns[self._groups.columns(mask, len(self._columns))]
        across = self._inverse[columns]
        ratio = torch.linalg.solve(across[:, columns], across)
        self._weight -= self._weight[:, columns] @ ratio
        self._inverse -= across.T @ ratio
        self._weight[:, columns] = 0  # without the rounding errors of the update
        self._inverse[columns] = 0
        self._inverse[:, columns] = 0
        self.removed |= mask
