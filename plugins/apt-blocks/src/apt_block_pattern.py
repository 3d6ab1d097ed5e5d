"""Whole blocks of a weight are pruned, such as those that a block-sparse kernel leaves out."""

import re
from dataclasses import dataclass, replace

from torch import Tensor

from apt.solver import Granularity, Pattern, lowest_k, parse_pattern


@dataclass(frozen=True)
class Blocks(Pattern):
    """A share of the blocks of a layer is pruned, at any position.

    Args:
        rows, columns: the outputs and inputs of a block.
        sparsity: the share of blocks pruned, below 1.
    """

    kind = "block"
    allocatable = True
    by_row = False

    rows: int
    columns: int
    sparsity: float

    def __post_init__(self) -> None:
        if not (self.rows and self.columns):
            raise ValueError(f"blocks of {self.rows} by {self.columns} weights have no weights")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity {self.sparsity:g} is outside [0, 1)")

    def __str__(self) -> str:
        return f"block:{self.rows}x{self.columns}@{self.sparsity:.12g}"

    @classmethod
    def parse(cls, text: str) -> Pattern | None:
        """Read ``block:16x16@0.5``."""
        if not (match := re.fullmatch(r"block:(\d+)x(\d+)(?:@([^:@]+))?", text)):
            return None
        if match[3] is None:
            raise ValueError(f"pattern {text} needs a share, such as {text}@0.5")
        return cls(int(match[1]), int(match[2]), parse_pattern(match[3]).sparsity)

    @property
    def alignment(self) -> int:
        """A window of columns has whole blocks."""
        return self.columns

    def misfit(self, shape: tuple[int, int], inputs: str = "inputs") -> str:
        """Blocks must divide the weight."""
        if shape[0] % self.rows == 0 == shape[1] % self.columns:
            return ""
        return f"is {shape[0]} × {shape[1]}, and not whole blocks of {self.rows} × {self.columns}"

    def required(self, shape: tuple[int, int]) -> int:
        """The weights of the pruned blocks."""
        return self._count(shape[0] * shape[1]) * self.step(shape)

    def step(self, shape: tuple[int, int]) -> int:
        """The weights of a block."""
        return self.rows * self.columns

    def _count(self, weights: int) -> int:
        """The number of pruned blocks among those of so many weights, rounded half up."""
        return int(self.sparsity * (weights // (self.rows * self.columns)) + 0.5)

    def lowest(self, scores: Tensor, per: Granularity = "layer", offset: int = 0) -> Tensor:
        """The mask of the blocks with the lowest sums of scores."""
        if misfit := self.misfit((scores.shape[0], scores.shape[1])):
            raise ValueError(f"the weight {misfit}")
        rows, end = len(scores), offset + scores.shape[1]
        sums = self._grouped(scores).sum((1, 3))
        count = self._count(rows * end) - self._count(rows * offset)
        indices = lowest_k(sums.reshape(1, -1), count).view_as(sums)
        return indices.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)

    def smallest(self, magnitudes: Tensor, per: Granularity = "layer") -> Tensor:
        """The mask of the blocks with the smallest sums of squares."""
        return self.lowest(magnitudes.square(), per)

    def shortfall(self, weight: Tensor) -> str:
        """The number of blocks of zeros, if it is too small."""
        if misfit := self.misfit((weight.shape[0], weight.shape[1])):
            return misfit
        zeros, needed = (
            int((self._grouped(weight) == 0).all(3).all(1).sum()),
            self._count(weight.numel()),
        )
        return "" if zeros >= needed else f"{zeros:,} blocks of zeros, {needed:,} needed"

    def at(self, sparsity: float) -> Pattern:
        """Blocks of the same size."""
        return replace(self, sparsity=sparsity)

    def with_zeros(self, zeros: int, shape: tuple[int, int]) -> Pattern | None:
        """The share of so many zeros."""
        return self.at(zeros / (shape[0] * shape[1]))

    def _grouped(self, weight: Tensor) -> Tensor:
        """A view (blocks, rows, blocks, columns)."""
        return weight.reshape(len(weight) // self.rows, self.rows, -1, self.columns)
