"""An exact check of the zeros in a model."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from apt.adapter import Adapter
from apt.patterns import SitePattern
from apt.planning.plan import Plan, PlannedBlock


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


def _verdict(name: str, weight: Tensor, pattern: SitePattern, expected: int | None) -> Verdict:
    zeros, detail = int((weight == 0).sum()), pattern.shortfall(weight)
    if not detail and expected is not None and zeros != expected:
        detail = f"{zeros:,} zeros, {expected:,} expected"
    return Verdict(name, not detail, zeros, weight.numel(), detail)


def failures(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """The verdicts of sites that do not meet their patterns."""
    return [verdict for verdict in verdicts if not verdict.holds]
