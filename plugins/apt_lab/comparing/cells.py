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
        """The method, with its effort and allocation unless they are defaults."""
        effort = "" if self.effort == "default" else f":{self.effort}"
        aware = registry().methods.get(self.method).error_aware
        default = default_allocation(read_pattern(self.pattern), error_aware=aware)
        allocation = "" if self.allocation == default else f"/{self.allocation}"
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
        AptError: a name or a pattern is unknown, or a method does not use an effort.
    """
    cells = [_cell(method, pattern) for pattern in patterns for method in methods]
    return list(dict.fromkeys(cells))


def _cell(text: str, pattern: str) -> Cell:
    parsed = read_pattern(pattern)
    name, _, allocation = text.partition("/")
    name, _, effort = name.partition(":")
    spec = registry().methods.get(name)
    options = PruneOptions(effort=effort or "default")  # type: ignore[arg-type]
    try:
        options.check()
        options.check_used(spec, registry().methods.specs.values(), "method")
    except AptError as error:
        raise AptError(f"{text}: {error.message}", error.hint) from error
    default = default_allocation(parsed, error_aware=spec.error_aware)
    allocation_name = registry().allocations.get(allocation).name if allocation else default
    if not parsed.allocatable:
        allocation_name = default
    return Cell(spec.name, options.effort, allocation_name, str(parsed))
