"""Sparsity patterns, and the selection of masks that meet them with the exact count."""

import math
import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from apt.solver.column_groups import ColumnGroups

Granularity = Literal["row", "layer"]

_SAMPLE = 2**14  # scores from which a threshold is estimated
_DIGITS = ".12g"  # of a share as text: its count of any number of weights must not change


@dataclass(frozen=True)
class Unstructured:
    """A share of the weights is pruned, at any position.

    Args:
        sparsity: the share of weights pruned, below 1. 0 keeps the zeros that are there.
        per: the unit over which the share is counted, each output row or the whole layer;
            None leaves the choice to the method.
    """

    sparsity: float
    per: Granularity | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity {self.sparsity:g} is outside [0, 1)")

    def __str__(self) -> str:
        return f"{self.sparsity:{_DIGITS}}"

    def count(self, weights: int) -> int:
        """The number of ``weights`` that are pruned: the share, rounded half up."""
        return math.floor(self.sparsity * weights + 0.5)

    def counted(self, per: Granularity) -> "Unstructured":
        """The same pattern, counted over ``per`` if its own ``per`` is None."""
        return self if self.per else replace(self, per=per)


@dataclass(frozen=True)
class MixedNM(Unstructured):
    """n:m with an ``n`` of its own for each site; an allocation chooses it before the pruning.

    Args:
        sparsity: the share of weights pruned in all sites together.
        per: unused.
        m: the size of a group of consecutive input weights.
    """

    m: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.m < 2:
            raise ValueError(f"groups of {self.m} weights have no n:m pattern")
        if not self.sparsity:
            raise ValueError(f"no n:{self.m} has a sparsity of 0")
        if self.sparsity > (most := 1 - 1 / self.m):
            raise ValueError(f"no n:{self.m} has a sparsity above {most:g}")

    def __str__(self) -> str:
        return f"auto:{self.m}@{self.sparsity:{_DIGITS}}"

    def fixed(self, pruned: int) -> "NM | None":
        """The pattern of a site that loses ``pruned`` of every m weights; None if it loses none."""
        return NM(self.m - pruned, self.m) if pruned else None


@dataclass(frozen=True)
class NM:
    """At most ``n`` of every ``m`` consecutive input weights are kept (2:4 keeps two of four)."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ValueError(
                f"pattern {self.n}:{self.m} keeps {self.n} of {self.m}; N:M needs 0 < N < M"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """The share of weights pruned."""
        return 1 - self.n / self.m


Pattern = Unstructured | NM
SitePattern = Pattern | ColumnGroups
"""The patterns of a site: those of sparse and those of structured pruning."""


def keeps_all(pattern: SitePattern | None) -> bool:
    """True for a sparsity of 0: no weight is removed, and the zeros that are there stay."""
    return isinstance(pattern, Unstructured) and not pattern.sparsity


def parse_pattern(text: str) -> Pattern:
    """Read ``0.5``, ``50%``, ``2:4`` or ``auto:8@0.5``, which is `MixedNM`.

    Raises:
        ValueError: the text has none of these forms, or is out of range.
    """
    text = text.strip()
    if match := re.fullmatch(r"auto:(\d+)@([^@]+)", text):
        whole = parse_pattern(match[2])
        if isinstance(whole, Unstructured):
            return MixedNM(whole.sparsity, m=int(match[1]))
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(int(match[1]), int(match[2]))
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ValueError(
            f"'{text}' is neither a sparsity such as 0.5 nor a pattern such as 2:4"
        ) from None
    return Unstructured(share)


def lowest(scores: Tensor, pattern: Pattern, per: Granularity = "layer", offset: int = 0) -> Tensor:
    """The mask (True = pruned) of the lowest ``scores`` (rows, columns) that meets ``pattern``.

    The count is exact even if scores are equal. ``per`` applies to an unstructured pattern whose
    own ``per`` is None. The masks of consecutive windows of columns, each with its ``offset``, add
    up to the exact count of the whole.

    Raises:
        ValueError: the columns are not a multiple of the m of n:m.
    """
    rows, columns = scores.shape
    if isinstance(pattern, NM):
        if columns % pattern.m:
            raise ValueError(f"{columns} columns are not a multiple of {pattern.m}")
        return _lowest_of_groups(scores.reshape(-1, pattern.m), pattern).view_as(scores)
    end = offset + columns
    if (pattern.per or per) == "row":
        return lowest_k(scores, pattern.count(end) - pattern.count(offset))
    count = pattern.count(rows * end) - pattern.count(rows * offset)
    return lowest_k(scores.reshape(1, -1), count).view_as(scores)


def lowest_k(scores: Tensor, k: int) -> Tensor:
    """The mask of the ``k`` lowest entries of each row of ``scores`` (rows, columns)."""
    if len(scores) == 1 and scores.shape[1] > 2 * _SAMPLE:
        return _lowest_of_many(scores[0], k).unsqueeze(0)
    if _selects_in_numpy(scores) and k > 0:
        mask = scores <= _kth_lowest(scores, k).unsqueeze(1)
        if int(mask.count_nonzero()) == k * len(scores):  # else some scores are equal
            return mask
    mask = torch.zeros_like(scores, dtype=torch.bool)
    chosen = scores.topk(k, dim=1, largest=False, sorted=False).indices
    return mask.scatter_(1, chosen, True)


def _lowest_of_groups(groups: Tensor, pattern: NM) -> Tensor:
    """`lowest_k` of many short rows, by comparison with thresholds unless scores are equal."""
    mask = groups < _nth_largest(list(groups.unbind(1)), pattern.n).unsqueeze(1)
    removed = pattern.m - pattern.n
    exact = int(mask.count_nonzero()) == removed * len(groups)
    return mask if exact else lowest_k(groups, removed)


def _lowest_of_many(scores: Tensor, k: int) -> Tensor:
    """`lowest_k` of one long row, about four times faster: only a bracket of scores is sorted.

    A sample of the scores gives the bracket, which is four standard deviations of the sampled rank
    wide. If the bracket misses the threshold (for scores in a regular order), all scores are
    sorted.
    """
    sample = scores[:: _stride(scores.numel())]
    size = len(sample)
    rank, margin = k / scores.numel() * size, 2 * math.sqrt(size)
    low, high = (
        _kth_lowest(sample, min(max(int(at), 0), size - 1) + 1)
        for at in (rank - margin, rank + margin + 1)
    )
    mask = scores < low
    middle = ((scores <= high) & ~mask).nonzero().squeeze(1)
    missing = k - int(mask.count_nonzero())
    if not 0 <= missing <= len(middle):
        middle, missing = torch.arange(scores.numel(), device=scores.device), k
        mask = torch.zeros_like(mask)
    chosen = scores[middle].topk(missing, largest=False, sorted=False).indices
    mask[middle[chosen]] = True
    return mask


def _stride(count: int) -> int:
    """An odd stride that samples about `_SAMPLE` of ``count`` scores, from all columns alike."""
    return max(1, count // _SAMPLE) | 1


def about_highest(magnitudes: Tensor, pattern: Pattern) -> Tensor:
    """A threshold by which ``magnitudes`` (columns, rows) meet ``pattern`` approximately.

    It serves searches that select at every step and need the exact count only at the end. Note the
    transposed layout: columns of the layer come first, so that a group of n:m is ``m`` consecutive
    rows and is compared element by element.

    Returns:
        A tensor that broadcasts against groups ``(columns / m, m, rows)`` for n:m, else against
        ``(1, columns, rows)``. Magnitudes at or above the threshold are kept.
    """
    if isinstance(pattern, NM):
        groups = magnitudes.view(-1, pattern.m, magnitudes.shape[1])
        return _nth_largest(list(groups.unbind(1)), pattern.n).unsqueeze(1)
    if pattern.per == "row":
        columns = magnitudes[:: max(1, len(magnitudes) // 512)]
        rank = min(pattern.count(len(columns)) + 1, len(columns))
        return _kth_lowest(columns.T, rank).view(1, 1, -1)
    flat = magnitudes.view(-1)
    sample = flat[:: _stride(flat.numel())]
    return _kth_lowest(sample, min(pattern.count(sample.numel()) + 1, sample.numel()))


def _kth_lowest(values: Tensor, k: int) -> Tensor:
    """The ``k``-th lowest entry along the last dimension, counted from 1."""
    if not _selects_in_numpy(values):
        return values.kthvalue(k).values
    rows = values.detach().contiguous().numpy()
    return torch.from_numpy(np.asarray(np.partition(rows, k - 1)[..., k - 1]))


def _selects_in_numpy(values: Tensor) -> bool:
    """True if numpy selects among ``values``.

    It takes a sixth of the time of torch, which however gives rows to several threads.
    """
    if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
        return False
    return min(values.numel() // max(1, values.shape[-1]), torch.get_num_threads()) < 6


def _nth_largest(values: list[Tensor], n: int) -> Tensor:
    """The element-wise ``n``-th largest, by a partial bubble sort: faster than `torch.topk`."""
    rank = len(values) - n + 1
    up = rank > n  # bubble from the nearer end
    for end in range(len(values) - 1, len(values) - 1 - min(n, rank), -1):
        for i in range(end):
            low, high = torch.minimum(*values[i : i + 2]), torch.maximum(*values[i : i + 2])
            values[i : i + 2] = (low, high) if up else (high, low)
    return values[len(values) - min(n, rank)]


def meets(weight: Tensor, pattern: SitePattern) -> bool:
    """True if ``weight`` (out, in) has at least the zeros that ``pattern`` requires.

    An unstructured pattern without ``per`` is counted over the layer.
    """
    if isinstance(pattern, ColumnGroups):
        return pattern.met_by(weight)
    if isinstance(pattern, NM) and weight.shape[1] % pattern.m:
        return False
    counts, needed = zero_counts(weight == 0, pattern)
    return bool((counts >= needed).all())


def surplus(weight: Tensor, dense: Tensor, pattern: SitePattern) -> int:
    """The number of weights, or groups, that are zero beyond a pattern, but not in ``dense``."""
    if isinstance(pattern, ColumnGroups):
        gone = pattern.zeros(weight) & ~pattern.zeros(dense)
        counts, needed = gone.view(pattern.bins, -1).sum(1), pattern.removed // pattern.bins
    else:
        counts, needed = zero_counts((weight == 0) & (dense != 0), pattern)
    return int((counts - needed).clamp_min(0).sum())


def zero_counts(zeros: Tensor, pattern: Pattern) -> tuple[Tensor, int]:
    """The ones of a mask (out, in) in each group of n:m, row or layer, and the number due there."""
    if isinstance(pattern, NM):
        return zeros.reshape(-1, pattern.m).sum(1), pattern.m - pattern.n
    if pattern.per == "row":
        return zeros.sum(1), pattern.count(zeros.shape[1])
    return zeros.sum().view(1), pattern.count(zeros.numel())
