"""The patterns of single weights that ship with APT: a share of the weights, and n:m."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from apt.patterns.protocol import Granularity, Pattern
from apt.patterns.selection import kth_lowest, lowest_k, lowest_of_groups, nth_largest, stride

_DIGITS = ".12g"  # of a share as text: its count of any number of weights must not change


@dataclass(frozen=True)
class Unstructured(Pattern):
    """A share of the weights is pruned, at any position.

    Args:
        sparsity: the share of weights pruned, below 1. 0 keeps the zeros of the dense weight.
        per: the unit over which the share is counted, each output row or the whole layer;
            None leaves the choice to the method.
    """

    kind = "share"
    allocatable = True
    movable = True

    sparsity: float
    per: Granularity | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity {self.sparsity:g} is outside [0, 1)")

    def __str__(self) -> str:
        return f"{self.sparsity:{_DIGITS}}"

    @classmethod
    def parse(cls, text: str) -> Pattern | None:
        """Read ``0.5`` or ``50%``."""
        try:
            share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            return None
        return Unstructured(share)

    @property
    def by_row(self) -> bool:
        """True if the share is counted in each row."""
        return self.per == "row"

    @property
    def keeps_all(self) -> bool:
        """True for a sparsity of 0."""
        return not self.sparsity

    def count(self, weights: int) -> int:
        """The number of ``weights`` that are pruned: the share, rounded half up."""
        return math.floor(self.sparsity * weights + 0.5)

    def counted(self, per: Granularity) -> "Unstructured":
        """The same pattern, counted over ``per`` if its own ``per`` is None."""
        return self if self.per else replace(self, per=per)

    def required(self, shape: tuple[int, int]) -> int:
        """The share of all weights, or of those of each row."""
        rows, columns = shape
        return rows * self.count(columns) if self.per == "row" else self.count(rows * columns)

    def zero_counts(self, zeros: Tensor) -> tuple[Tensor, int]:
        """The zeros of a mask in each row, or in the layer, and the required number."""
        if self.per == "row":
            return zeros.sum(1), self.count(zeros.shape[1])
        return super().zero_counts(zeros)

    def shortfall(self, weight: Tensor) -> str:
        """The row with the fewest zeros, or the number of zeros of the layer."""
        counts, needed = self.zero_counts(weight == 0)
        if bool((counts >= needed).all()):
            return ""
        if self.per == "row":
            row = int(counts.argmin())
            return f"row {row} has {int(counts[row]):,} zeros, {needed:,} needed in each"
        return f"{int(counts):,} zeros, {needed:,} needed"

    def lowest(self, scores: Tensor, per: Granularity = "layer", offset: int = 0) -> Tensor:
        """The mask of the lowest scores of each row, or of the layer."""
        rows, columns = scores.shape
        end = offset + columns
        if (self.per or per) == "row":
            return lowest_k(scores, self.count(end) - self.count(offset))
        count = self.count(rows * end) - self.count(rows * offset)
        return lowest_k(scores.reshape(1, -1), count).view_as(scores)

    def keep_largest(self, magnitudes: Tensor) -> None:
        """Keep the magnitudes at or above `threshold`."""
        magnitudes.unsqueeze(0).ge_(self.threshold(magnitudes))

    def threshold(self, magnitudes: Tensor) -> Tensor:
        """A threshold by which ``magnitudes`` (columns, rows) meet the share approximately.

        It broadcasts against ``(1, columns, rows)``.
        """
        if self.per == "row":
            columns = magnitudes[:: max(1, len(magnitudes) // 512)]
            rank = min(self.count(len(columns)) + 1, len(columns))
            return kth_lowest(columns.T, rank).view(1, 1, -1)
        flat = magnitudes.view(-1)
        sample = flat[:: stride(flat.numel())]
        return kth_lowest(sample, min(self.count(sample.numel()) + 1, sample.numel()))

    def rest(self, shape: tuple[int, int], dead: int) -> Pattern | None:
        """The share of the weights of live inputs that completes the count."""
        rows, columns = 1 if self.per == "row" else shape[0], shape[1]
        count, live = self.count(rows * columns) - rows * dead, rows * (columns - dead)
        return replace(self, sparsity=count / live) if 0 < count < live else None

    def of_channels(self) -> Pattern | None:
        """The share of the weights of all channels."""
        return self.counted("layer")

    @property
    def knots(self) -> Sequence[float] | None:
        """None: weights are pruned one by one."""
        return None

    def at(self, sparsity: float) -> Pattern:
        """A share; the method chooses its unit."""
        return Unstructured(sparsity)

    def step(self, shape: tuple[int, int]) -> int:
        """One weight of each row, or one weight."""
        return shape[0] if self.per == "row" else 1

    def with_zeros(self, zeros: int, shape: tuple[int, int]) -> Pattern | None:
        """The share with this number of zeros."""
        return replace(self, sparsity=zeros / (shape[0] * shape[1]))


@dataclass(frozen=True)
class MixedNM(Unstructured):
    """n:m with a separate ``n`` for each site, which an allocation chooses before the pruning.

    Args:
        sparsity: the share of weights pruned in all sites together.
        per: unused.
        m: the size of a group of consecutive input weights.
    """

    kind = "auto:m"
    may_be_dense = True
    settled = False

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

    @classmethod
    def parse(cls, text: str) -> Pattern | None:
        """Read ``auto:8@0.5``."""
        if not (match := re.fullmatch(r"auto:(\d+)@([^@]+)", text)):
            return None
        share = Unstructured.parse(match[2].strip())
        return None if share is None else MixedNM(share.sparsity, m=int(match[1]))

    @property
    def group(self) -> int | None:
        """The size m of a group."""
        return self.m

    @property
    def knots(self) -> Sequence[float] | None:
        """The sparsities of all n:m."""
        return [k / self.m for k in range(self.m + 1)]

    def misfit(self, shape: tuple[int, int], inputs: str = "inputs") -> str:
        """The inputs must be a multiple of m."""
        return _misfit(self.m, shape, inputs)

    def of_channels(self) -> Pattern | None:
        """A share, since an allocation gives patterns to sites only."""
        return Unstructured(self.sparsity, "layer")

    def at(self, sparsity: float) -> Pattern:
        """The nearest n:m with some zeros."""
        pruned = min(max(round(sparsity * self.m), 1), self.m - 1)
        return NM(self.m - pruned, self.m)

    def step(self, shape: tuple[int, int]) -> int:
        """One weight of each group."""
        return shape[0] * shape[1] // self.m

    def with_zeros(self, zeros: int, shape: tuple[int, int]) -> Pattern | None:
        """n:m with this number of zeros; None without zeros."""
        pruned = zeros // self.step(shape)
        return NM(self.m - pruned, self.m) if pruned else None


@dataclass(frozen=True)
class NM(Pattern):
    """At most ``n`` of every ``m`` consecutive input weights are kept (2:4 keeps two of four)."""

    kind = "n:m"
    movable = True

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ValueError(
                f"pattern {self.n}:{self.m} keeps {self.n} of {self.m}; N:M needs 0 < N < M"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @classmethod
    def parse(cls, text: str) -> Pattern | None:
        """Read ``2:4``."""
        match = re.fullmatch(r"(\d+):(\d+)", text)
        return None if match is None else NM(int(match[1]), int(match[2]))

    @property
    def sparsity(self) -> float:
        """The share of weights pruned."""
        return 1 - self.n / self.m

    @property
    def group(self) -> int | None:
        """The size m of a group."""
        return self.m

    def required(self, shape: tuple[int, int]) -> int:
        """m − n zeros in each group."""
        rows, columns = shape
        return rows * (columns // self.m) * (self.m - self.n)

    def zero_counts(self, zeros: Tensor) -> tuple[Tensor, int]:
        """The ones of a mask in each group, and m − n."""
        return zeros.reshape(-1, self.m).sum(1), self.m - self.n

    def shortfall(self, weight: Tensor) -> str:
        """The first group that keeps too many."""
        rows, columns = weight.shape
        if columns % self.m:
            return f"its {columns} inputs are not a multiple of {self.m}"
        kept = (weight != 0).reshape(rows, -1, self.m).sum(-1)
        more = kept > self.n
        if not bool(more.any()):
            return ""
        row, group = more.nonzero()[0].tolist()
        start = group * self.m
        return (
            f"row {row} keeps {int(kept[row, group])} of inputs {start} to {start + self.m - 1}; "
            f"{int(more.sum()):,} of {kept.numel():,} groups fail"
        )

    def misfit(self, shape: tuple[int, int], inputs: str = "inputs") -> str:
        """The inputs must be a multiple of m."""
        return _misfit(self.m, shape, inputs)

    def lowest(self, scores: Tensor, per: Granularity = "layer", offset: int = 0) -> Tensor:
        """The mask of the lowest scores of each group; raises ValueError for part of a group."""
        if scores.shape[1] % self.m:
            raise ValueError(f"{scores.shape[1]} columns are not a multiple of {self.m}")
        return lowest_of_groups(scores.reshape(-1, self.m), self.n).view_as(scores)

    def keep_largest(self, magnitudes: Tensor) -> None:
        """Keep the magnitudes at or above `threshold`."""
        magnitudes.view(-1, self.m, magnitudes.shape[1]).ge_(self.threshold(magnitudes))

    def threshold(self, magnitudes: Tensor) -> Tensor:
        """The n-th largest of each group of ``magnitudes`` (columns, rows).

        A group is ``m`` consecutive rows, and is compared element by element: the threshold
        broadcasts against ``(columns / m, m, rows)``.
        """
        groups = magnitudes.view(-1, self.m, magnitudes.shape[1])
        return nth_largest(list(groups.unbind(1)), self.n).unsqueeze(1)

    def of_channels(self) -> Pattern | None:
        """n:m, in the groups of each channel."""
        return self


def _misfit(m: int, shape: tuple[int, int], inputs: str) -> str:
    return f"has {shape[1]} {inputs}, not a multiple of {m}" if shape[1] % m else ""


def read(given: object, kinds: Iterable[type[Pattern]], forms: Sequence[str] = ()) -> Pattern:
    """The pattern ``given``, or the pattern of a text or a number by the first kind that reads it.

    Args:
        forms: texts of kinds of other packages, for the message.

    Raises:
        ValueError: no kind reads the text, or it is out of range.
        TypeError: a kind returns a value that is no pattern.
    """
    if isinstance(given, Pattern):
        return given
    text = str(given).strip()
    pattern = next((p for kind in kinds if (p := kind.parse(text)) is not None), None)
    if pattern is None:
        others = "".join(f" or {form}" for form in forms)
        message = f"'{text}' is neither a sparsity such as 0.5 nor a pattern such as 2:4"
        raise ValueError(message + others)
    if not isinstance(pattern, Pattern):
        raise TypeError(f"is read as {type(pattern).__name__}, not as an apt.solver.Pattern")
    return pattern


def parse_pattern(text: str) -> Pattern:
    """Read ``0.5``, ``50%``, ``2:4`` or ``auto:8@0.5``, which is `MixedNM`.

    Raises:
        ValueError: the text has none of these forms, or is out of range.
    """
    return read(text, (MixedNM, NM, Unstructured))
