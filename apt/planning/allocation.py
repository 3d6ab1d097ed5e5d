"""The allocation of a sparsity to sites, before any of them is pruned."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from torch import Tensor, nn

from apt.adapter import Adapter
from apt.errors import AptError
from apt.planning.plan import Plan, PlannedSite
from apt.solver import Unstructured

UNIFORM = "uniform"
_DIGITS = 4
_SLACK = 1e-3


class Allocation(Protocol):
    """A function from the dense model to the sparsity of each unstructured site, by full name.

    The total number of zeros must remain that of the plan.
    """

    def __call__(
        self, model: nn.Module, adapter: Adapter, plan: Plan, tokens: Tensor, /
    ) -> Mapping[str, float]:
        """Allocate the sparsity of ``plan``, with calibration ``tokens`` (samples, seqlen)."""


def unstructured(plan: Plan) -> list[PlannedSite]:
    """The sites whose sparsity an allocation can change."""
    return [site for site in plan.sites if isinstance(site.pattern, Unstructured)]


def check_allocation(name: str, plan: Plan) -> None:
    """Raise if no site has a sparsity that the allocation could change."""
    if name != UNIFORM and not unstructured(plan):
        raise AptError(
            f"allocation {name} cannot be used: n:m fixes the sparsity of every site",
            "give a sparsity",
            ("sparsity",),
        )


def allocated(
    plan: Plan,
    name: str,
    allocation: Allocation,
    model: nn.Module,
    adapter: Adapter,
    tokens: Tensor,
) -> Plan:
    """``plan`` with the sparsities that the allocation ``name`` gives to its unstructured sites.

    Raises:
        AptError: it omits a site, gives a sparsity that is not between 0 and 1, or changes the
            total number of zeros by more than a thousandth of the weights.
    """
    shares = allocation(model, adapter, plan, tokens)
    sites = unstructured(plan)
    for site in sites:
        if not 0 < round(shares.get(site.name, 0.0), _DIGITS) < 1:
            given = f"{shares[site.name]:g}" if site.name in shares else "no value"
            raise AptError(f"allocation {name} gives {given} as the sparsity of {site.name}")
    whole = Plan(
        tuple(
            replace(block, sites=tuple(_with(shares, site) for site in block.sites))
            for block in plan.blocks
        )
    )
    size = sum(site.size for site in sites)
    drift = (_zeros(whole) - _zeros(plan)) / max(size, 1)
    if abs(drift) > _SLACK:
        raise AptError(f"allocation {name} changes the overall sparsity by {drift:+.2%}")
    return whole


def _with(shares: Mapping[str, float], site: PlannedSite) -> PlannedSite:
    if not isinstance(site.pattern, Unstructured):
        return site
    share = round(shares[site.name], _DIGITS)
    return replace(site, pattern=replace(site.pattern, sparsity=share))


def _zeros(plan: Plan) -> int:
    return sum(
        site.pattern.count(site.size)
        for site in unstructured(plan)
        if isinstance(site.pattern, Unstructured)
    )
