"""An exact check of the zeros in a model."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor, nn

from apt.adapter import Adapter
from apt.patterns import SitePattern
from apt.planning.plan import Plan, PlannedBlock


@dataclass(frozen=True)
class Verdict:
    """The result of the check of one site.

    Attributes:
        name: the full name of the site.
        holds: True if the site meets its pattern and the expected number of zeros.
        zeros: the number of zeros.
        size: the number of weights.
        detail: the reason if the check has failed.
    """

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
    """Check the zeros of a block: ``expected`` numbers by site, or the minimum of its pattern."""
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
    """The zeros of each site in the output of a run.

    Args:
        written: opens a written block by its name.
        visit: called with the name and the module of each block.

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
    zeros, detail = int((weight == 0).sum()), pattern.shortfall(weight)
    if not detail and expected is not None and zeros != expected:
        detail = f"{zeros:,} zeros, {expected:,} expected"
    return Verdict(name, not detail, zeros, weight.numel(), detail)


def failures(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """The verdicts of sites that do not meet their patterns."""
    return [verdict for verdict in verdicts if not verdict.holds]
