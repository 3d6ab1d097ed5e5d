"""The allocation of a sparsity to sites, before any of them is pruned."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol, cast

from torch import Tensor, nn

from apt.adapter import Adapter
from apt.errors import AptError
from apt.patterns import Pattern, Unstructured
from apt.planning.plan import Plan, PlannedBlock, PlannedSite
from apt.plugin.specs import AUTO, UNIFORM

_SLACK = 1e-3

Opened = Callable[[str, nn.Module], AbstractContextManager[None]]
"""A function from the name and the module of a block to a context in which its dense weights are in
memory. The blocks of a streamed run are on the meta device outside of it."""


@dataclass(frozen=True)
class Unallocated:
    """A dense model whose sparsity is still the same for all sites.

    Attributes:
        model: the model.
        adapter: the adapter of its family.
        plan: the plan.
        tokens: calibration token ids (samples, seqlen).
        opened: opens a block.
        error_aware: True if the run has error-aware targets, which make up for a part of the error
            of earlier blocks.
    """

    model: nn.Module
    adapter: Adapter
    plan: Plan
    tokens: Tensor
    opened: Opened = lambda name, block: nullcontext()
    error_aware: bool = False

    def blocks(self) -> list[tuple[PlannedBlock, nn.Module]]:
        """The planned blocks with their modules."""
        modules = dict(self.adapter.blocks(self.model))
        return [(planned, modules[planned.name]) for planned in self.plan.blocks]


class Allocation(Protocol):
    """A function from the dense model to the sparsity of each unstructured site, by full name.

    The sites are those of `unstructured`; an override fixes the others. Their total number of zeros
    must remain that of the plan, within a thousandth of their weights. It is then made exact. The
    function restores the weights that it changes.
    """

    def __call__(self, given: Unallocated, /) -> Mapping[str, float]:
        """Allocate the sparsity of the plan."""


def allocated(name: str, allocation: Allocation, given: Unallocated) -> dict[str, float]:
    """The sparsities of an allocation, as numbers; raises `AptError` for something else."""
    returned: object = allocation(given)
    if not isinstance(returned, Mapping):
        fault = f"returns {type(returned).__name__}, not the sparsities of the sites"
        raise _unusable(name, fault)
    shares = dict[str, float]()
    for site, share in returned.items():
        try:
            shares[str(site)] = float(share)
        except (TypeError, ValueError) as error:
            fault = f"gives {type(share).__name__} as the sparsity of {site}"
            raise _unusable(name, fault) from error
    return shares


def _unusable(name: str, fault: str) -> AptError:
    return AptError(f"allocation {name} {fault}", "choose another allocation", ("allocation",))


def unstructured(plan: Plan | PlannedBlock) -> list[PlannedSite]:
    """The sites of a plan or a block whose sparsity an allocation can change."""
    return [s for s in plan.sites if s.pattern and s.pattern.allocatable and not s.fixed]


def sparsity_of(site: PlannedSite) -> float:
    """The sparsity of an unstructured site."""
    return _sparse(site).sparsity


def _sparse(site: PlannedSite) -> Pattern:
    """The pattern of a site that is not dense, in a plan without removed columns."""
    return cast(Pattern, site.pattern)


def default_allocation(pattern: Pattern, *, error_aware: bool) -> str:
    """The name of the allocation for a pattern, if none is given.

    A sparsity that is given for each row or each layer is the same everywhere.

    Args:
        pattern: the pattern of the run.
        error_aware: True for an error-aware run of a method that is error-aware by default. Other
            methods are known with the same sparsity for every site.
    """
    if not pattern.sparsity:
        return UNIFORM
    free = pattern.allocatable and pattern.per is None and error_aware
    return AUTO if free or not pattern.settled else UNIFORM


def is_needed(name: str, plan: Plan) -> bool:
    """True if the patterns of the plan are not final."""
    return name != UNIFORM or any(s.pattern and not s.pattern.settled for s in plan.sites)


def check_allocation(name: str, plan: Plan) -> None:
    """Raise if no site has a sparsity that the allocation could change."""
    if name != UNIFORM and not unstructured(plan):
        fault = f"allocation {name} cannot be used: n:m or overrides fix the sparsity of every site"
        hint = "leave it out, or leave some sites to a sparsity"
        raise AptError(fault, hint, ("allocation", "sparsity", "overrides"))


def with_shares(plan: Plan, name: str, shares: Mapping[str, float]) -> Plan:
    """``plan`` with the sparsities of an allocation, and exactly the same number of zeros.

    If a sparsity is counted in each row, the number of zeros of a site is a multiple of its number
    of rows; with n:m, it is a multiple of its number of groups. The total is then as near as such
    steps come.

    Args:
        shares: the sparsity of each unstructured site.

    Raises:
        AptError: a site is missing, its sparsity is not between 0 and 1, or the total number of
            zeros differs by more than a thousandth of the weights.
    """
    sites = unstructured(plan)
    for site in sites:
        least = -1e-9 if _sparse(site).may_be_dense else 0
        if not least < shares.get(site.name, least) < 1:
            given = f"{shares[site.name]:g}" if site.name in shares else "no value"
            raise _unusable(name, f"gives {given} as the sparsity of {site.name}")
    total = sum(Unstructured(sparsity_of(site)).count(site.size) for site in sites)
    drift = sum((shares[site.name] - sparsity_of(site)) * site.size for site in sites)
    drift /= max(sum(site.size for site in sites), 1)
    if abs(drift) > _SLACK:
        raise AptError(f"allocation {name} changes the overall sparsity by {drift:+.2%}")
    exact = _exact(sites, shares, total)
    return replace(plan, blocks=tuple(_with(block, exact) for block in plan.blocks))


def step_of(site: PlannedSite) -> int:
    """The number of weights in steps of which a site can lose weights."""
    return _sparse(site).step(site.shape)


def _exact(sites: Sequence[PlannedSite], shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Numbers of steps near the shares, with ``total`` zeros; largest fractions are rounded up."""
    units = {site.name: step_of(site) for site in sites}
    least = {site.name: int(not _sparse(site).may_be_dense) for site in sites}
    most = {site.name: site.size // units[site.name] - 1 for site in sites}
    wanted = {site.name: shares[site.name] * site.size / units[site.name] for site in sites}
    counts = {name: min(max(int(steps), least[name]), most[name]) for name, steps in wanted.items()}
    left = total - sum(counts[name] * unit for name, unit in units.items())
    by_fraction = sorted(counts, key=lambda name: counts[name] - wanted[name])
    while left:
        before, step = left, 1 if left > 0 else -1
        for name in by_fraction if step > 0 else reversed(by_fraction):
            count = counts[name] + step
            smaller = abs(left - step * units[name]) < abs(left)
            if smaller and least[name] <= count <= most[name]:
                counts[name], left = count, left - step * units[name]
        if left == before:
            break
    return counts


def _with(block: PlannedBlock, counts: Mapping[str, int]) -> PlannedBlock:
    """The block with other sparsities of the sites that have counts."""

    def changed(site: PlannedSite) -> PlannedSite:
        if site.name not in counts:
            return site
        zeros = counts[site.name] * step_of(site)
        return site.with_pattern(_sparse(site).with_zeros(zeros, site.shape))

    return replace(block, sites=tuple(changed(site) for site in block.sites))
