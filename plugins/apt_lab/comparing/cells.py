"""The cells of a comparison: a method with its effort and allocation, and a pattern."""

from collections.abc import Sequence
from dataclasses import dataclass

from apt.errors import AptError
from apt.extending import registry
from apt.options import Effort, PruneOptions
from apt.planning.allocation import default_allocation
from apt.planning.plan import read_pattern


@dataclass(frozen=True)
class Cell:
    """A run of a comparison.

    Attributes:
        method: the name of the method.
        effort: the effort.
        allocation: the name of the allocation.
        pattern: the pattern, as text.
    """

    method: str
    effort: Effort
    allocation: str
    pattern: str

    @property
    def label(self) -> str:
        """The method, with what is not a default."""
        effort = "" if self.effort == "default" else f":{self.effort}"
        aware = registry().methods.get(self.method).error_aware
        plain = default_allocation(read_pattern(self.pattern), error_aware=aware)
        allocation = "" if self.allocation == plain else f"/{self.allocation}"
        return f"{self.method}{effort}{allocation}"

    @property
    def key(self) -> str:
        """The identity of the cell in a comparison."""
        return f"{self.label} {self.pattern}"


def read_cells(methods: Sequence[str], patterns: Sequence[str]) -> list[Cell]:
    """The cells of all methods with all patterns.

    Args:
        methods: ``NAME[:EFFORT][/ALLOCATION]``. An allocation is left out with n:m patterns.
        patterns: patterns as text.

    Raises:
        AptError: a name or a pattern is not known, or a method does not use an effort.
    """
    found = [_cell(method, pattern) for pattern in patterns for method in methods]
    return list(dict.fromkeys(found))


def _cell(text: str, pattern: str) -> Cell:
    wanted = read_pattern(pattern)
    name, _, allocation = text.partition("/")
    name, _, effort = name.partition(":")
    spec = registry().methods.get(name)
    options = PruneOptions(effort=effort or "default")  # type: ignore[arg-type]
    try:
        options.check()
        options.check_used(spec, registry().methods.specs.values(), "method")
    except AptError as error:
        raise AptError(f"{text}: {error.message}", error.hint) from error
    plain = default_allocation(wanted, error_aware=spec.error_aware)
    chosen = registry().allocations.get(allocation).name if allocation else plain
    if not wanted.allocatable:
        chosen = plain
    return Cell(spec.name, options.effort, chosen, str(wanted))
