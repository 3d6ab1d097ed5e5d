"""A model in memory for which the level of each tensor was chosen under a budget."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from apt.adapter import Site
from apt.engine.in_memory import InMemory
from apt.fit.outer import Outer
from apt.fit.table import LossTable
from apt.solver import Rounded


@dataclass(frozen=True)
class FitChoice:
    """The result of the choice under a budget.

    Attributes:
        table: the table of losses.
        levels: the name of the level of each tensor.
        outer: the statistics of the embedding and the head; None if they have no levels.
    """

    table: LossTable
    levels: Mapping[str, str]
    outer: Outer | None


class Fitted(InMemory):
    """A model in memory whose weights get the forms of their levels.

    Its task is an `apt.engine.fit_task.FitTask`.

    Attributes:
        choice: the chosen levels; None before the choice.
        trained: the parameters that were trained after the rounding.
        written_bytes: the bytes of the written files of weights.
    """

    choice: FitChoice | None = None
    written_bytes: int = 0

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._fit: Any = self._task
        self.trained: Mapping[str, Tensor] = {}

    def keep_rounded(self, name: str, site: Site | None, weight: Rounded) -> None:
        """Keep the stored form of a rounded weight; the site is None for one outside the blocks."""
