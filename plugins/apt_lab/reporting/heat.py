"""Tables of blocks and kinds of sites, coloured by value."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from apt.events import SitePruned


@dataclass(frozen=True)
class Cell:
    """A cell: its text, and its place between the lowest and the highest value, in percent."""

    text: str
    share: float


@dataclass(frozen=True)
class Heat:
    """A table with a row for each block and a column for each kind of site, or for each expert.

    Attributes:
        title: the name of the values.
        columns: the kinds, or the indices of the experts.
        rows: the name of each block with its cells; None where a block has no site of a kind.
        lowest, highest: the texts of the ends of the scale.
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Cell | None]]]
    lowest: str
    highest: str

    def short(self, column: str) -> str:
        """The last part of a kind's name, if it is unique among the kinds."""
        last = column.rpartition(".")[2]
        equal_names = [other for other in self.columns if other.rpartition(".")[2] == last]
        return last if len(equal_names) == 1 else column


def heat(
    title: str,
    sites: Sequence[SitePruned],
    value: Callable[[SitePruned], float],
    write: Callable[[float], str],
    column: Callable[[SitePruned], str] = lambda site: site.kind,
) -> Heat:
    """The table of a value of the sites; a cell has the mean of its sites.

    Args:
        title: the name of the values.
        sites: the pruned sites, in the order of the blocks.
        value: the value of a site.
        write: the text of a value.
        column: the column of a site.
    """
    groups: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for site in sites:
        groups[block_of(site)][column(site)].append(value(site))
    means = {
        block: {kind: fmean(values) for kind, values in kinds.items()}
        for block, kinds in groups.items()
    }
    return heat_of(title, list(dict.fromkeys(column(site) for site in sites)), means, write)


def heat_of(
    title: str,
    columns: list[str],
    means: Mapping[str, Mapping[str, float]],
    write: Callable[[float], str],
) -> Heat:
    """The table of values by row and column."""
    finite = [v for kinds in means.values() for v in kinds.values() if math.isfinite(v)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)

    def cell(number: float | None) -> Cell | None:
        if number is None:
            return None
        share = (number - low) / (high - low) if high > low and math.isfinite(number) else 0.0
        return Cell(write(number), round(100 * share, 1))

    rows = [(block, [cell(kinds.get(kind)) for kind in columns]) for block, kinds in means.items()]
    return Heat(title, columns, rows, write(low), write(high))


def source_heat(routing: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> Heat | None:
    """The share of each source's router weight that each expert of a block gets.

    A row is a block and a source. None without experts.
    """
    rows = dict[str, dict[str, float]]()
    for block, by_source in routing.items():
        for source, weights in by_source["weights"].items():
            total = sum(map(float, weights)) or 1.0
            shares = {str(expert): float(weight) / total for expert, weight in enumerate(weights)}
            rows[f"{block}, {source}"] = shares
    columns = list(dict.fromkeys(expert for shares in rows.values() for expert in shares))
    if not columns:
        return None
    return heat_of("Router weight of each source by expert", columns, rows, "{:.1%}".format)


def expert_of(site: SitePruned) -> str:
    """The index of an expert of a stack; empty for another site."""
    name, _, index = site.name.rpartition(".")
    return index if name.endswith(site.kind) and not site.name.endswith(site.kind) else ""


def block_of(site: SitePruned) -> str:
    """The full name of a site's block."""
    index = expert_of(site)  # the name ends with the kind and the index
    name = site.name.removesuffix(f".{index}" if index else "").removesuffix(site.kind)
    return name.rstrip(".") or site.name
