"""The levels of the tensors of a model: the target forms that a format has, and their sizes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from apt.patterns import Grid, Pattern, TargetForm, Unstructured
from apt.planning.plan import Plan, PlannedBlock, PlannedSite


@dataclass(frozen=True)
class Level:
    """One way to store a tensor.

    Attributes:
        name: the name in the format, such as ``q4_K``.
        size: the bytes of the tensor in the file, with its padding; the largest number if they
            depend on the values.
        grid: the grid of its values; None if they are not rounded.
        pattern: the pattern of its zeros; None if no weight is removed.
        expected: a function from the share of zeros to the bytes, if they depend on the values.
    """

    name: str
    size: int
    grid: Grid | None = None
    pattern: Pattern | None = None
    expected: Callable[[float], int] | None = None

    @property
    def form(self) -> TargetForm | None:
        """The target form of a weight at this level; None if its values stay as they are."""
        if self.grid is None and self.pattern is None:
            return None
        return TargetForm(self.pattern or Unstructured(0.0), self.grid)

    def size_with(self, zeros: float) -> int:
        """The expected bytes of a tensor with this share of zeros."""
        return self.size if self.expected is None else min(self.size, self.expected(zeros))


@dataclass(frozen=True)
class FileForm:
    """What a file of one model can hold.

    Attributes:
        levels: the levels of each tensor whose level can be chosen, by the name of its parameter.
        rest: the bytes of the file without these tensors.
        tied: groups of tensors that have the same level.
    """

    levels: Mapping[str, Sequence[Level]]
    rest: int
    tied: Sequence[tuple[str, ...]] = ()

    def level(self, tensor: str, name: str) -> Level:
        """A level of a tensor, by its name."""
        return next(level for level in self.levels[tensor] if level.name == name)


def with_levels(plan: Plan, form: FileForm, levels: Mapping[str, str]) -> Plan:
    """The plan with the form of the chosen level of each site; other sites stay as they are."""
    return replace(
        plan, blocks=tuple(block_with_levels(block, form, levels) for block in plan.blocks)
    )


def block_with_levels(
    block: PlannedBlock, form: FileForm, levels: Mapping[str, str]
) -> PlannedBlock:
    """A block with the forms of the chosen levels of its sites; see `with_levels`."""

    def changed(entry: PlannedSite) -> PlannedSite:
        name = f"{block.name}.{entry.site.parameter}"
        return replace(entry, form=form.level(name, levels[name]).form if name in levels else None)

    return replace(block, sites=tuple(map(changed, block.sites)))
