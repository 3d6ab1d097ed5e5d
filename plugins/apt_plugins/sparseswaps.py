"""SparseSwaps: Wanda's mask, refined by swaps of single weights (arXiv 2512.10922).

Let ``d`` be the pruned weights of a row, zero elsewhere. Then the row's loss is ``d G dᵀ``. Let
``c = d G``. A swap keeps the pruned column p and prunes the kept column u; it changes the loss by

    ``(w_u² G_uu + 2 w_u c_u) + (w_p² G_pp − 2 w_p c_p) − 2 w_u w_p G_up``,

a term of u, a term of p and their coupling. Only the first two depend on the rest of the mask. So
the table of couplings (pruned, kept) of a row is computed once, and a swap replaces one row and one
column of it. For n:m, swaps stay within groups; an unstructured row is a single group.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from apt.solver import Gram, Pattern, Solution, SolverOptions, full_precision
from apt_plugins.baselines import wanda

MAX_SWAPS = 100
"""The greatest number of swaps in a row, as in the paper."""

_LEAST = 1e-6  # least gain of a swap, as a share of the row's loss: the limit of fp32 precision
_CHUNK = 2**25  # couplings of a chunk of rows on a GPU: 128 MiB in fp32, and a buffer as large
_CPU_CHUNK = 2**22  # the same on a CPU, which is a third faster if a chunk fits into its caches


@full_precision()
def sparseswaps(weight: Tensor, gram: Gram, pattern: Pattern, options: SolverOptions) -> Solution:
    """Apply the best swap of every row as long as it lowers the row's loss; no compensation.

    Args:
        weight: the dense ``W`` (out, in).
        gram: the Gram matrix of the layer's inputs (in, in); the loss uses its undamped mean over
            tokens.
        pattern: the pattern; an unstructured one without ``per`` is counted in each row.
        options: unused.
    """
    mask = wanda(weight, gram, pattern, options).mask
    matrix = gram.matrix / max(gram.tokens, 1)
    refine(weight.to(matrix.dtype), matrix, mask, pattern.group or weight.shape[1])
    return Solution(weight.masked_fill(mask, 0), mask)


def refine(weight: Tensor, matrix: Tensor, mask: Tensor, group: int) -> None:
    """Improve a mask in place by at most `MAX_SWAPS` swaps in every row.

    Args:
        weight: the dense ``W`` (out, in).
        matrix: the Gram matrix ``G`` (in, in), in any scale.
        mask: the initial mask (out, in), True where pruned; the count of every group is unchanged.
        group: the number of consecutive columns in a group; a swap stays within one.
    """
    counts = mask.reshape(len(mask), -1, group).sum(2)
    pruned, kept = int(counts.max()), group - int(counts.min())
    couplings = pruned * kept * counts.shape[1]
    if couplings == 0:
        return
    chunk = _CPU_CHUNK if weight.device.type == "cpu" else _CHUNK
    parts = (torch.split(tensor, max(1, chunk // couplings)) for tensor in (weight, mask))
    for some, selected in zip(*parts, strict=True):
        _refine_rows(_Rows.of(some, matrix, selected, group, pruned, kept), matrix, selected)


@dataclass(frozen=True)
class _Rows:
    """The rows of a chunk that still improve. The tensors are changed in place.

    A slot holds the index of a column. If rows differ in their counts of pruned weights, some slots
    of rows with smaller counts hold columns of the other kind; ``mask`` excludes these from swaps.

    Attributes:
        place: the indices of the rows in their chunk (rows,).
        weight, mask, slope: ``w``, True where pruned, and ``c`` (rows, in).
        pruned, kept: slots (rows, groups, pruned) and (rows, groups, kept).
        coupling: ``−2 w_p w_u G_pu`` (rows, groups, pruned, kept).
    """

    place: Tensor
    weight: Tensor
    mask: Tensor
    slope: Tensor
    pruned: Tensor
    kept: Tensor
    coupling: Tensor

    @classmethod
    def of(
        cls, weight: Tensor, matrix: Tensor, mask: Tensor, group: int, pruned: int, kept: int
    ) -> "_Rows":
        """All rows of a chunk: ``weight`` and ``mask`` (rows, in)."""
        grouped = mask.reshape(len(mask), -1, group)
        columns = torch.arange(mask.shape[1], device=mask.device).view(-1, group)
        order = grouped.byte().argsort(dim=2, descending=True) + columns[:, :1]
        p, u = order[..., :pruned].contiguous(), order[..., group - kept :].contiguous()
        coupling = _coupling(weight, matrix, p.unsqueeze(3), u.unsqueeze(2))
        place = torch.arange(len(mask), device=mask.device)
        return cls(place, weight, mask.clone(), (weight * mask) @ matrix, p, u, coupling)

    def take(self, selection: Tensor) -> "_Rows":
        """The rows where ``selection`` (rows,) is True."""
        return _Rows(*(getattr(self, field.name)[selection] for field in fields(self)))


def _coupling(weight: Tensor, matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``−2 w_i w_j G_ij`` (rows, …) for columns i and j (rows, …) that broadcast together."""
    w_left, w_right = (weight.gather(1, at.flatten(1)).view_as(at) for at in (left, right))
    return matrix[left, right].mul_(w_left).mul_(w_right).mul_(-2)


def _refine_rows(rows: _Rows, matrix: Tensor, mask: Tensor) -> None:
    """Swap until no row improves, and write the result to ``mask`` (rows, in)."""
    buffer = torch.empty_like(rows.coupling)
    for _ in range(MAX_SWAPS):
        change, back, gone = _best_swaps(rows, matrix, buffer[: len(rows.place)])
        loss = (rows.weight * rows.mask).mul_(rows.slope).sum(1)
        improves = change < -_LEAST * loss
        if not improves.all():
            mask[rows.place] = rows.mask
            rows, back, gone = rows.take(improves), back[improves], gone[improves]
        if len(rows.place) == 0:
            return
        _swap(rows, matrix, back, gone)
    mask[rows.place] = rows.mask


def _best_swaps(rows: _Rows, matrix: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best swap of every row.

    Returns:
        The change of its loss, its pruned slot numbered through all groups, and its kept slot
        within the group, each (rows,).
    """
    squares = rows.weight.square().mul_(matrix.diagonal())
    cross = 2 * rows.weight * rows.slope
    losses = (squares + cross).masked_fill_(rows.mask, math.inf)
    gains = (squares - cross).masked_fill_(~rows.mask, math.inf)
    losses = losses.gather(1, rows.kept.flatten(1)).view_as(rows.kept)
    gains = gains.gather(1, rows.pruned.flatten(1))
    table = torch.add(rows.coupling, losses.unsqueeze(2), out=buffer).flatten(1, 2)
    change, back = gains.add_(table.amin(2)).min(1)
    gone = table[torch.arange(len(table), device=table.device), back].argmin(1)
    return change, back, gone


def _swap(rows: _Rows, matrix: Tensor, back: Tensor, gone: Tensor) -> None:
    """Keep each row's pruned slot ``back`` and prune its kept slot ``gone``, both (rows,)."""
    rows_index = torch.arange(len(back), device=back.device)
    group, back = back // rows.pruned.shape[2], back % rows.pruned.shape[2]
    p, u = (rows.pruned[rows_index, group, back, None], rows.kept[rows_index, group, gone, None])
    rows.mask.scatter_(1, p, False).scatter_(1, u, True)
    for column, sign in ((u, 1), (p, -1)):
        rows.slope.addcmul_(rows.weight.gather(1, column), matrix[column[:, 0]], value=sign)
    rows.pruned[rows_index, group, back], rows.kept[rows_index, group, gone] = u[:, 0], p[:, 0]
    line = _coupling(rows.weight, matrix, u, rows.kept[rows_index, group])
    rows.coupling[rows_index, group, back] = line
    line = _coupling(rows.weight, matrix, p, rows.pruned[rows_index, group])
    rows.coupling[rows_index, group, :, gone] = line
