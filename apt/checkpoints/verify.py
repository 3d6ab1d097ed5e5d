"""An exact check of the zeros in a model."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor, nn

from apt.adapter import Adapter
from apt.planning.plan import Plan, PlannedBlock
from apt.solver import NM, ColumnGroups, SitePattern
from apt.solver.patterns import meets


@dataclass(frozen=True)
class Verdict:
    """The check of one site: its zeros, of all its weights, and the fault if it has one."""

    name: str
    holds: bool
    zeros: int
    size: int
    detail: str = ""


def verify(
    model: nn.Module, adapter: Adapter, plan: Plan, expected: Mapping[str, int] | None = None
) -> list[Verdict]:
    """Count the zeros of every planned site; see `block_verdicts`."""
    modules = dict(adapter.blocks(model))
    return [v for b in plan.blocks for v in block_verdicts(b, modules[b.name], expected)]


def block_verdicts(
    planned: PlannedBlock, block: nn.Module, expected: Mapping[str, int] | None = None
) -> Iterator[Verdict]:
    """Count the zeros of a block: ``expected`` by site, or at least those of its pattern."""
    exact = expected or {}
    for entry in planned.pruned:
        assert entry.pattern is not None
        weight = entry.site.oriented(entry.site.weight(block).detach())
        yield _verdict(entry.name, weight, entry.pattern, exact.get(entry.name))
    for extra in planned.extras:
        weight = extra.extra.weight(block).detach()
        yield _verdict(extra.name, weight, extra.pattern, exact.get(extra.name))


def zeros_of(
    plan: Plan,
    written: Callable[[str], AbstractContextManager[nn.Module]],
    visit: Callable[[str, nn.Module], None] = lambda name, block: None,
) -> dict[str, int]:
    """The zeros of each site of a model that a run has written.

    Args:
        written: a context in which the block of a name, as written, is in memory.
        visit: called with each block and its name.

    Raises:
        RuntimeError: a site does not meet its pattern.
    """
    zeros = dict[str, int]()
    for planned in plan.blocks:
        with written(planned.name) as block:
            visit(planned.name, block)
            verdicts = list(block_verdicts(planned, block))
        if failed := failures(verdicts):
            raise RuntimeError(f"{failed[0].name} on disk: {failed[0].detail}")
        zeros |= {verdict.name: verdict.zeros for verdict in verdicts}
    return zeros


def _verdict(name: str, weight: Tensor, pattern: SitePattern, expected: int | None) -> Verdict:
    zeros, detail = int((weight == 0).sum()), ""
    if not meets(weight, pattern):
        detail = _detail(weight, pattern)
    elif expected is not None and zeros != expected:
        detail = f"{zeros:,} zeros, {expected:,} expected"
    return Verdict(name, not detail, zeros, weight.numel(), detail)


def _detail(weight: Tensor, pattern: SitePattern) -> str:
    if isinstance(pattern, ColumnGroups):
        return f"too few of its {pattern.count} groups are zero: {pattern} are kept"
    if not isinstance(pattern, NM):
        zeros, size = (weight == 0).sum(1), weight.numel()
        if pattern.per == "row":
            row = int(zeros.argmin())
            wanted = pattern.count(weight.shape[1])
            return f"row {row} has {int(zeros[row]):,} zeros, {wanted:,} needed in each"
        return f"{int(zeros.sum()):,} zeros, {pattern.count(size):,} needed"
    if weight.shape[1] % pattern.m:
        return f"its {weight.shape[1]} inputs are not a multiple of {pattern.m}"
    kept = (weight != 0).reshape(weight.shape[0], -1, pattern.m).sum(-1)
    row, group = (kept > pattern.n).nonzero()[0].tolist()
    start = group * pattern.m
    return (
        f"row {row} keeps {int(kept[row, group])} of inputs {start} to {start + pattern.m - 1}; "
        f"{int((kept > pattern.n).sum()):,} of {kept.numel():,} groups fail"
    )


def failures(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """The verdicts of sites that do not meet their patterns."""
    return [verdict for verdict in verdicts if not verdict.holds]
