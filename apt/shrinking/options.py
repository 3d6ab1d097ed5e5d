"""The options that decide how small a model becomes, and what it loses."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from apt.errors import AptError
from apt.shrinking.search import SearchOptions

Budget = Literal["parameters", "latency"]
BUDGETS: tuple[Budget, ...] = ("parameters", "latency")
Mode = Literal["width", "depth", "search"]
MODES: tuple[Mode, ...] = ("width", "depth", "search")


@dataclass(frozen=True)
class ShrinkOptions:
    """The options of a smaller model.

    Args:
        keep: the share of the budget that is kept, between 0 and 1.
        budget: ``"parameters"`` of the blocks, or ``"latency"``: the time of a forward through the
            blocks, measured on this machine.
        mode: ``"width"`` removes groups, ``"depth"`` drops blocks, ``"search"`` searches among
            models with fewer groups and blocks. None is ``"depth"`` for models of at least 8 blocks
            if a number of blocks is within 2 % of ``keep``, else ``"width"`` where it can.
        compensate: True if the kept columns get exact least-squares weights. The default depends on
            the method.
        multiple_of: the multiple that a number of channels must be. By default 64, or the greatest
            smaller power of two with which the share comes within 1 % of ``keep``.
        sizes: the number of groups to keep, by kind, in place of ``keep``.
        blocks: the number of blocks to keep, in place of ``keep``.
        drop: the indices of the blocks to drop, in place of ``keep`` and of a choice.
        search: the options of the search.
    """

    keep: float = 0.75
    budget: Budget = "parameters"
    mode: Mode | None = None
    compensate: bool | None = None
    multiple_of: int | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    blocks: int | None = None
    drop: tuple[int, ...] = ()
    search: SearchOptions = field(default_factory=SearchOptions)

    @property
    def explicit(self) -> bool:
        """True if the size is given in place of a share."""
        return bool(self.sizes) or self.blocks is not None or bool(self.drop)

    def check(self) -> None:
        """Raise `AptError` if a value is out of range."""
        if not 0 < self.keep < 1:
            raise AptError(
                f"keep {self.keep:g} is outside (0, 1)",
                "it is a share of the blocks' parameters, such as 0.75",
                ("keep",),
            )
        if self.mode not in (None, *MODES):
            raise AptError(f"mode '{self.mode}' is none of {', '.join(MODES)}")
        if self.budget not in BUDGETS:
            raise AptError(
                f"budget '{self.budget}' is none of {', '.join(BUDGETS)}", options=("budget",)
            )
        if self.multiple_of is not None and self.multiple_of < 1:
            raise AptError(
                f"a multiple of {self.multiple_of} is not possible", "give 1 or more",
                ("multiple_of",),
            )  # fmt: skip
        if self.explicit:
            self._check_explicit()
        minutes = self.search.minutes
        if self.search.evaluations < 1 or (minutes is not None and not minutes > 0):
            fault = "a search needs at least one candidate and some time"
            raise AptError(fault, options=("evaluations", "minutes"))

    def _check_explicit(self) -> None:
        """Raise for an option that chooses a size, or that contradicts the given one."""
        by_blocks = self.blocks is not None or bool(self.drop)
        fits = {None: True, "width": not by_blocks, "depth": not self.sizes, "search": False}
        if not fits[self.mode]:
            flag = "search" if self.mode == "search" else f"{self.mode}_only"
            raise _not_used(f"mode '{self.mode}'", flag)
        if self.budget != "parameters":
            raise _not_used(f"budget '{self.budget}'", "budget")
        if self.multiple_of is not None:
            raise _not_used(f"a multiple of {self.multiple_of}", "multiple_of")

    def record(self) -> dict[str, Any]:
        """The options as plain values, for the report."""
        plain = {"sizes": dict(self.sizes), "drop": list(self.drop), "search": vars(self.search)}
        return {**vars(self), **plain}


def _not_used(what: str, option: str) -> AptError:
    said = f"{what} is for a share to keep, and does not fit the given blocks or groups"
    return AptError(said, "leave it out", (option,))
