"""The levels of the least loss whose file is not larger than a budget.

This is the multiple-choice knapsack problem. The Lagrangian relaxation takes, in each tensor, the
level of least ``loss + multiplier · size``. With the multipliers at which the file just fits, the
result is optimal except for the bytes that are left over. A local search spends these: it changes
one or two tensors at a time, as long as the loss falls and the file fits.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from apt.fit.levels import FileForm
from apt.fit.table import LossTable, MeasuredLevel

_NEGLIGIBLE = 1e-3
"""A loss in nats for each token that no measurement shows."""

_PAIRED = 64
"""The number of changes of one tensor that are tried in pairs, the best first."""


class DoesNotFitError(ValueError):
    """No choice of levels fits into the budget.

    Attributes:
        smallest: the bytes of the smallest file.
    """

    def __init__(self, smallest: int) -> None:
        super().__init__(f"the smallest file has {smallest:,} bytes")
        self.smallest = smallest


def smallest_size(form: FileForm) -> int:
    """The bytes of the smallest file."""
    return form.rest + sum(min(x.size for x in levels) for levels in form.levels.values())


def choose(table: LossTable, budget: int) -> dict[str, str]:
    """The level of each tensor, by name, for a file of at most ``budget`` bytes.

    Raises:
        DoesNotFitError: the smallest file is larger.
    """
    return table.separate(_chosen(table.joined(), budget))


def _chosen(table: LossTable, budget: int) -> dict[str, str]:
    """`choose` for a table without tied tensors."""
    if table.smallest > budget:
        raise DoesNotFitError(table.smallest)
    hulls = {name: lower_hull(levels) for name, levels in table.tensors.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    left = budget - table.smallest
    # Along a lower hull the gain for each byte falls, so that the best steps come in their order.
    steps = [
        (_gain(small, large), name, large)
        for name, hull in hulls.items()
        for small, large in pairwise(hull)
    ]
    for _, name, large in sorted(steps, key=lambda step: (-step[0], step[1], step[2].size)):
        more = large.size - chosen[name].size
        if 0 < more <= left:  # a later step of the same tensor includes the steps before it
            chosen[name], left = large, left - more
    chosen = _improved(table, chosen, left)
    return {name: level.name for name, level in chosen.items()}


def choose_first(
    table: LossTable, first: Collection[str], form: FileForm, budget: int
) -> dict[str, str]:
    """The level of each tensor, for files whose sizes are known only when tensors are written.

    The expected size of the whole is at most the budget. The tensors of ``first`` are written next:
    with their largest sizes, and the smallest levels of all other tensors, the file fits too.
    So a file that is written in several steps never exceeds the budget.

    Args:
        table: the tensors that are not written yet; its ``rest`` includes all others.
        form: the largest sizes.
    """
    choice = choose(table, budget)
    others = table.rest + sum(
        min(level.size for level in form.levels[name])
        for name in table.tensors
        if name not in first
    )
    largest = {
        name: tuple(
            replace(level, size=form.level(name, level.name).size) for level in table.tensors[name]
        )
        for name in first
    }
    bounded = LossTable(largest, others)
    if bounded.size({name: choice[name] for name in first}) <= budget:
        return choice
    return choice | choose(bounded, budget)


def frontier(table: LossTable, count: int = 10) -> list[tuple[int, float]]:
    """The bytes and the loss of the best files of ``count`` budgets, from the smallest file on.

    The budgets end where the loss is at most `_NEGLIGIBLE`.
    """
    low, high = table.smallest, table.largest
    while high - low > (table.largest - table.smallest) / 1000 + 1:
        middle = (low + high) // 2
        if table.loss(choose(table, middle)) > _NEGLIGIBLE:
            low = middle
        else:
            high = middle
    step = (high - table.smallest) / (count - 1)
    choices = [choose(table, int(table.smallest + step * place)) for place in range(count)]
    return [(table.size(choice), table.loss(choice)) for choice in choices]


def lower_hull(levels: Sequence[MeasuredLevel]) -> list[MeasuredLevel]:
    """The levels on the lower convex hull of the loss over the size, from small to large.

    A level that is not smaller and not better than another is left out.
    """
    hull = list[MeasuredLevel]()
    for level in sorted(levels, key=lambda each: (each.size, each.loss)):
        if hull and level.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], level):
            hull.pop()
        hull.append(level)
    return hull


def _gain(small: MeasuredLevel, large: MeasuredLevel) -> float:
    """The loss that each further byte saves."""
    return (small.loss - large.loss) / (large.size - small.size)


def _improved(
    table: LossTable, chosen: Mapping[str, MeasuredLevel], left: int
) -> dict[str, MeasuredLevel]:
    """A choice of lower loss near ``chosen``, with at most ``left`` more bytes."""
    best = dict(chosen)
    while True:
        changes = [
            (level.loss - best[name].loss, level.size - best[name].size, name, level)
            for name, levels in table.tensors.items()
            for level in levels
            if level != best[name]
        ]
        changes.sort(key=lambda change: (*change[:3], change[3].name))
        single = next((change for change in changes if change[0] < 0 and change[1] <= left), None)
        found = [single] if single else _pair(changes, left)
        if not found:
            return best
        for _, more, name, level in found:
            best[name], left = level, left - more


_Change = tuple[float, int, str, MeasuredLevel]
"""The changes of the loss and of the bytes, and the new level of a tensor."""


def _pair(changes: Sequence[_Change], left: int) -> list[_Change]:
    """The best two changes of different tensors that lower the loss and fit; empty if none do."""
    gains = [change for change in changes if change[0] < 0][:_PAIRED]
    savings = sorted((change for change in changes if change[1] < 0), key=lambda c: c[0])[:_PAIRED]
    pairs = [
        (gain[0] + saving[0], gain, saving)
        for gain in gains
        for saving in savings
        if gain[2] != saving[2] and gain[1] + saving[1] <= left and gain[0] + saving[0] < -1e-15
    ]
    if not pairs:
        return []
    _, gain, saving = min(pairs, key=lambda pair: pair[0])
    return [gain, saving]
