"""The target form of a weight: a pattern of zeros, and a grid of points."""

from dataclasses import dataclass

from apt.patterns.grids import Grid
from apt.patterns.protocol import SitePattern


@dataclass(frozen=True)
class TargetForm:
    """The pattern and the grid of the result of a run for a weight (out, in).

    Attributes:
        pattern: the pattern of zeros.
        grid: the grid to which kept weights are rounded; None for no rounding.
    """

    pattern: SitePattern
    grid: Grid | None = None
