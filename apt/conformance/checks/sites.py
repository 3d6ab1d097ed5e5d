"""Checks of the declared sites: names, orientation, completeness."""

from collections import Counter

from torch import nn

from apt.adapter import Adapter, Site
from apt.conformance.checks.promise import Fault, Faults, promise
from apt.conformance.checks.subject import Step, Subject, products
from apt.conformance.oracle import Selection


@promise("sites")
def check_names(subject: Subject) -> Faults:
    """Blocks and sites have their paths in the model as names; site names are unique in a block."""
    paths = dict(subject.model.named_modules(remove_duplicate=False))
    for name, block, sites in subject.blocks():
        if paths.get(name) is not block:
            yield Fault(name, ": the model has no such module, or it is not this block", "blocks")
        parameters = dict(block.named_parameters(remove_duplicate=False))
        declared = dict.fromkeys((site.parameter for site in sites), "sites")
        extras = subject.adapter.extras(block)
        declared |= dict.fromkeys((extra.parameter for extra in extras), "extras")
        for parameter, method in declared.items():
            if parameter not in parameters:
                yield Fault(name, f": there is no parameter {parameter}", method)
        for site in sites:
            path = site.parameter.removesuffix(".weight")
            expected = path if site.expert is None else f"{path}.{site.expert}"
            if site.name != expected:
                parameter_text = f"{site.parameter}{_slice(site.expert)}"
                yield name, f": the site of {parameter_text} is named {site.name}, not {expected}"
        for duplicate in [n for n, count in Counter(s.name for s in sites).items() if count > 1]:
            yield name, f": two sites are named {duplicate}"


@promise("sites")
def check_sites(subject: Subject) -> Faults:
    """Each weight of a block is a site, an extra, or listed in left_dense; each site is used."""
    for name, block, sites in subject.blocks():
        weights = Counter((site.parameter, site.expert) for site in sites)
        for (parameter, expert), count in weights.items():
            if count > 1:
                yield name, f".{parameter}{_slice(expert)} is declared as {count} sites"
        for weight in _undeclared(subject.adapter, block, sites):
            yield name, f".{weight} is not a site, not an extra, and not listed in left_dense"
    for step in subject.steps():
        seen = products(subject, step)
        for site in step.sites:
            if site not in seen and not site.routed:
                yield step.name, f".{site.name} is a site, but is never multiplied"
        for name in _routers(subject, step):
            message = (
                "selects the experts of a token: declare it as their router, which stays dense"
            )
            yield step.name, f".{name} is a site, but its product {message}"
    for name in _never_routed(subject):
        yield "", f"{name} is declared routed, but every block multiplies it with every token"


def _routers(subject: Subject, step: Step) -> list[str]:
    """The names of the sites of a block with experts that are the weights of routers."""
    experts = max(Counter(site.order for site in step.sites if site.routed).values(), default=0)
    if not experts:
        return []
    weights = {site: site.weight(step.block).data for site in step.sites if not site.routed}
    selection = Selection(weights)
    with selection:
        subject.step(step)
    # Products that select tokens, for sparse attention, have an output for each head.
    return [s.name for s in selection.routers if len(s.oriented(weights[s])) >= experts]


def _never_routed(subject: Subject) -> list[str]:
    """Routed sites outside stacks that are alone in their order and get all tokens."""
    sees_all: dict[str, bool] = {}
    for step in subject.steps():
        orders = Counter(site.order for site in step.sites if site.routed)
        candidates = [
            s for s in step.sites if s.routed and s.expert is None and orders[s.order] == 1
        ]
        seen = products(subject, step) if candidates else {}
        for site in candidates:
            all_seen = site in seen and seen[site].tokens == subject.tokens.numel()
            sees_all[site.name] = sees_all.get(site.name, True) and all_seen
    return [name for name, always in sees_all.items() if always]


@promise("sites")
def check_orientation(subject: Subject) -> Faults:
    """A site is declared transposed if and only if its weight is stored (in, out)."""
    for step in subject.steps():
        for site, seen in products(subject, step).items():
            stored = next((s for s in seen.stored if s is not None), site.transposed)
            if stored != site.transposed:
                layout = "(in, out)" if stored else "(out, in)"
                declaration = f"but declared transposed={site.transposed}"
                yield step.name, f".{site.name} is stored {layout}, {declaration}"


def _undeclared(adapter: Adapter, block: nn.Module, sites: list[Site]) -> list[str]:
    """Undeclared parameters of two or more dimensions, and undeclared slices of them."""
    declared = {site.parameter for site in sites if site.expert is None}
    declared |= {extra.parameter for extra in adapter.extras(block)}
    slices = {(site.parameter, site.expert) for site in sites}
    stacked = {site.parameter for site in sites if site.expert is not None}
    dense = set(left_dense(adapter, block))
    undeclared = []
    for name, parameter in block.named_parameters():
        if parameter.ndim < 2 or name in declared or {name, name.rpartition(".")[0]} & dense:
            continue
        missing = [i for i in range(len(parameter)) if (name, i) not in slices]
        undeclared += [f"{name}[{i}]" for i in missing] if name in stacked else [name]
    return undeclared


def left_dense(adapter: Adapter, block: nn.Module) -> tuple[str, ...]:
    """The weights of a block that stay dense: ``left_dense``, or the result of ``left_dense_of``.

    They are paths within the block, of parameters or of modules with parameters.
    """
    of = getattr(adapter, "left_dense_of", None)
    return tuple(of(block)) if of is not None else getattr(adapter, "left_dense", ())


def _slice(expert: int | None) -> str:
    return "" if expert is None else f"[{expert}]"
