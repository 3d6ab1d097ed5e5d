"""The target form of a weight: a pattern of zeros, and a grid of integers."""

import math
from dataclasses import dataclass
from typing import Literal

from apt.patterns.protocol import SitePattern

ScaleGroup = int | Literal["row"]
"""A number of columns that share a scale, or a whole row."""

COLUMNS = 64
"""Groups are multiples of this number, as the kernels for packed matrices need them."""


@dataclass(frozen=True)
class IntegerGrid:
    """Integers around 0, with a scale for each group of columns of a row.

    Args:
        bits: 8 or 4.
        group: the number of columns that share a scale, or ``"row"`` for all.
    """

    bits: int
    group: ScaleGroup = 128

    def columns(self, width: int) -> int:
        """The number of columns that share a scale in a weight of ``width`` columns.

        It is at most the width, rounded up to a multiple of `COLUMNS`.
        """
        padded = max(1, math.ceil(width / COLUMNS)) * COLUMNS
        return padded if self.group == "row" else min(self.group, padded)

    @property
    def most(self) -> int:
        """The largest integer."""
        return int(2 ** (self.bits - 1)) - 1


@dataclass(frozen=True)
class TargetForm:
    """The pattern and the grid of the result of a run for a weight (out, in).

    Attributes:
        pattern: the pattern of zeros.
        grid: the grid to which kept weights are rounded; None for no rounding.
    """

    pattern: SitePattern
    grid: IntegerGrid | None = None
