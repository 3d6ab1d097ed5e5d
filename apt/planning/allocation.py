"""The allocation of a sparsity to sites, before any of them is pruned."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol, cast

from torch import Tensor, nn

from apt.adapter import Adapter, Samples
from apt.errors import AptError
from apt.patterns import Pattern, Unstructured
from apt.planning.plan import Plan, PlannedBlock, PlannedSite
from apt.plugin.specs import AUTO, UNIFORM

_SLACK = 1e-3

Opened = Callable[[str, nn.Module], AbstractContextManager[None]]
"""A function from the name and the module of a block to a context with its dense weights in memory.

Outside the context, the blocks of a streamed run are on the meta device."""


@dataclass(frozen=True)
class Unallocated:
    """A dense model whose sparsity is still the same for all sites.

    Attributes:
        model: the model.
        adapter: the adapter of its family.
        plan: the plan.
        tokens: calibration token ids (samples, seqlen), or other samples.
        opened: opens a block.
        error_aware: True if the run has error-aware targets, which compensate for a part of the
            error of earlier blocks.
    """

    model: nn.Module
    adapter: Adapter
    plan: Plan
    tokens: Tensor | Samples
    opened: Opened = lambda name, block: nullcontext()
    error_aware: bool = False

    @property
    def windows(self) -> Tensor:
        """The token ids (samples, seqlen).

        Raises:
            AptError: the model is not a decoder of text.
        """
        if isinstance(self.tokens, Tensor):
            return self.tokens
        message = f"this allocation needs the next token, which {type(self.model).__name__} lacks"
        raise AptError(message, f"choose {AUTO} or {UNIFORM}", ("allocation",))

    def blocks(self) -> list[tuple[PlannedBlock, nn.Module]]:
        """The planned blocks with their modules."""
        modules = dict(self.adapter.blocks(self.model))
        return [(planned, modules[planned.name]) for planned in self.plan.blocks]


class Allocation(Protocol):
    """A function from the dense model to the sparsity of each unstructured site, by full name.

    The sites are those of `unstructured`; overrides fix all other sites. The total number of zeros
    must equal the total of the plan, within a thousandth of the weights of these sites. The run
    then makes the total exact. The function restores the weights that it changes.
    """

    def __call__(self, given: Unallocated, /) -> Mapping[str, float]:
        """Allocate the sparsity of the plan."""


def allocated(name: str, allocation: Allocation, unallocated: Unallocated) -> dict[str, float]:
    """The sparsities of an allocation, as numbers; raises `AptError` for other values."""
    result: object = allocation(unallocated)
    if not isinstance(result, Mapping):
        message = f"returns {type(result).__name__}, not the sparsities of the sites"
        raise _allocation_error(name, message)
    shares = dict[str, float]()
    for site, share in result.items():
        try:
            shares[str(site)] = float(share)
        except (TypeError, ValueError) as error:
            message = f"gives {type(share).__name__} as the sparsity of {site}"
            raise _allocation_error(name, message) from error
    return shares


def _allocation_error(name: str, message: str) -> AptError:
    return AptError(f"allocation {name} {message}", "choose another allocation", ("allocation",))


def unstructured(plan: Plan | PlannedBlock) -> list[PlannedSite]:
    """The sites of a plan or a block whose sparsity an allocation can change."""
    return [s for s in plan.sites if s.pattern and s.pattern.allocatable and not s.fixed]


def sparsity_of(site: PlannedSite) -> float:
    """The sparsity of an unstructured site."""
    return _pattern_of(site).sparsity


def _pattern_of(site: PlannedSite) -> Pattern:
    """The pattern of a pruned site, in a plan without removed columns."""
    return cast(Pattern, site.pattern)


def default_allocation(pattern: Pattern, *, error_aware: bool) -> str:
    """The name of the allocation for a pattern, if none is given.

    A sparsity that is counted in each row or each layer is uniform.

    Args:
        pattern: the pattern of the run.
        error_aware: True for an error-aware run of a method that is error-aware by default. Other
            methods are used with the same sparsity for every site, as in their papers.
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
        raise AptError(
            f"allocation {name} cannot be used: n:m or overrides fix the sparsity of every site",
            "leave it out, or leave some sites to a sparsity",
            ("allocation", "sparsity", "overrides"),
        )


def with_shares(plan: Plan, name: str, shares: Mapping[str, float]) -> Plan:
    """``plan`` with the sparsities of an allocation, and exactly the same number of zeros.

    If a sparsity is counted in each row, the number of zeros of a site is a multiple of its number
    of rows; with n:m, it is a multiple of its number of groups. The total is then the nearest one
    that such steps reach.

    Args:
        shares: the sparsity of each unstructured site.

    Raises:
        AptError: a site is missing, its sparsity is not between 0 and 1, or the total number of
            zeros differs by more than a thousandth of the weights.
    """
    sites = unstructured(plan)
    for site in sites:
        lower = -1e-9 if _pattern_of(site).may_be_dense else 0
        if not lower < shares.get(site.name, lower) < 1:
            text = f"{shares[site.name]:g}" if site.name in shares else "no value"
            raise _allocation_error(name, f"gives {text} as the sparsity of {site.name}")
    total = sum(Unstructured(sparsity_of(site)).count(site.size) for site in sites)
    drift = sum((shares[site.name] - sparsity_of(site)) * site.size for site in sites)
    drift /= max(sum(site.size for site in sites), 1)
    if abs(drift) > _SLACK:
        raise AptError(f"allocation {name} changes the overall sparsity by {drift:+.2%}")
    exact = _exact_counts(sites, shares, total)
    return replace(plan, blocks=tuple(_with_counts(block, exact) for block in plan.blocks))


def step_of(site: PlannedSite) -> int:
    """The step of the number of zeros of a site, in weights."""
    return _pattern_of(site).step(site.shape)


def _exact_counts(
    sites: Sequence[PlannedSite], shares: Mapping[str, float], total: int
) -> dict[str, int]:
    """Numbers of steps near the shares, with ``total`` zeros; the largest fractions round up."""
    units = {site.name: step_of(site) for site in sites}
    least = {site.name: int(not _pattern_of(site).may_be_dense) for site in sites}
    most = {site.name: site.size // units[site.name] - 1 for site in sites}
    targets = {site.name: shares[site.name] * site.size / units[site.name] for site in sites}
    counts = {
        name: min(max(int(steps), least[name]), most[name]) for name, steps in targets.items()
    }
    remaining = total - sum(counts[name] * unit for name, unit in units.items())
    by_fraction = sorted(counts, key=lambda name: counts[name] - targets[name])
    while remaining:
        previous, step = remaining, 1 if remaining > 0 else -1
        for name in by_fraction if step > 0 else reversed(by_fraction):
            count = counts[name] + step
            smaller = abs(remaining - step * units[name]) < abs(remaining)
            if smaller and least[name] <= count <= most[name]:
                counts[name], remaining = count, remaining - step * units[name]
        if remaining == previous:
            break
    return counts


def _with_counts(block: PlannedBlock, counts: Mapping[str, int]) -> PlannedBlock:
    """The block with other sparsities of the sites that have counts."""

    def changed(site: PlannedSite) -> PlannedSite:
        if site.name not in counts:
            return site
        zeros = counts[site.name] * step_of(site)
        return site.with_pattern(_pattern_of(site).with_zeros(zeros, site.shape))

    return replace(block, sites=tuple(changed(site) for site in block.sites))
