"""The plan and the settings of a pruning, from its options: the same for runs and programs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from apt.adapter import Adapter
from apt.engine.prune_model import Pruning
from apt.engine.recipes import augmentation_of, recipe_of
from apt.errors import AptError, name_of
from apt.options import PruneOptions, SolveOptions
from apt.patterns import Pattern, keeps_all
from apt.planning.allocation import (
    Allocation,
    check_allocation,
    default_allocation,
    is_needed,
    unstructured,
)
from apt.planning.permutable import with_permutable
from apt.planning.plan import Plan, Selection, check_rounding, make_plan, tell_shared
from apt.plugin.registry import Registry
from apt.plugin.specs import UNIFORM, MethodSpec, ShrinkMethodSpec
from apt.pruning.layer import Method, Recipe
from apt.text.augmentation import Augmentation
from apt.text.self_generated import writes


@dataclass(frozen=True)
class Dense:
    """The dense model of a run.

    Attributes:
        model: the model; it may be a skeleton.
        samples: the number of the given calibration samples.
        seed: the seed for the text that the model generates, and for a search.
        streams: True if the blocks stay on disk.
        device: the device on which a latency is measured.
        notice: called with a line about each choice that the user did not make.
    """

    model: nn.Module
    adapter: Adapter
    config: Any
    registry: Registry
    samples: int
    seed: int = 0
    streams: bool = False
    device: str = "auto"
    notice: Callable[[str], None] = lambda line: None

    def settings(self, options: SolveOptions, method: MethodSpec) -> tuple[Recipe, Augmentation]:
        """What the options mean for a method.

        Raises:
            AptError: an option is out of range, or the method does not use it.
        """
        smaller = isinstance(method, ShrinkMethodSpec)
        known: Any = self.registry.shrink_methods if smaller else self.registry.methods
        options.check()
        options.check_used(method, known.specs.values(), "method")
        recipe, added = recipe_of(options, method), augmentation_of(options, method, self.samples)
        if options.own_samples is not None or not added.own_samples or writes(self.model):
            return recipe, added
        kind = type(self.model).__name__
        self.notice(f"own samples: 0 (not {added.own_samples}: {kind} cannot generate text)")
        return recipe, replace(added, own_samples=0)


@dataclass(frozen=True)
class Sparsity:
    """The zeros that are wanted; see `apt.prune`."""

    pattern: Pattern
    selection: Selection = field(default_factory=Selection)
    also: Sequence[str] = ()
    allocation: str | Allocation | None = None


def sparse_pruning(
    dense: Dense, wanted: Sparsity, method: MethodSpec, function: Method, options: PruneOptions
) -> Pruning:
    """The pruning to a sparse model, with a method and its spec.

    Raises:
        AptError: an option is out of range, or the pattern does not fit the model.
    """
    if keeps_all(wanted.pattern):  # tuning and random tokens make up for weights that are gone
        epochs, copies = options.tuning_epochs or 0, options.random_tokens or 0
        options = replace(options, tuning_epochs=epochs, random_tokens=copies)
    recipe, augmentation = dense.settings(options, method)
    plan = make_plan(
        dense.model, dense.adapter, wanted.pattern, wanted.selection, method.per, wanted.also
    )
    _check_method(plan, method, dense.registry)
    tell_shared(plan, dense.notice)
    check_rounding(plan, dense.notice, recipe.integers is not None)
    if recipe.permute:
        plan = with_permutable(plan, dense.model, dense.adapter, dense.config)
    if options.permute and not any(block.permutable for block in plan.blocks):
        fault = "permute has no effect: no n:m site has inputs that can change places"
        raise AptError(fault, "leave it out", ("permute",))
    rows = recipe.row_importance
    if (
        options.row_importance
        and rows
        and not any(rows.serves(s.site, s.pattern) for s in plan.sites)
    ):
        fault = "row importance has no effect: every row of every site keeps as many weights"
        raise AptError(fault, "leave it out", ("row_importance",))
    allocation = wanted.allocation
    if allocation is None:
        aware = recipe.error_aware and method.error_aware and bool(unstructured(plan))
        allocation = default_allocation(wanted.pattern, error_aware=aware)
        if allocation != UNIFORM:
            dense.notice(f"allocation: {allocation} (default)")
    return Pruning(
        dense.adapter, plan, function, recipe, augmentation,
        _allocation(allocation, plan, dense.registry), seed=dense.seed,
    )  # fmt: skip


def _check_method(plan: Plan, method: MethodSpec, registry: Registry) -> None:
    """Raise if a method does not prune to the pattern of a site."""
    for site in (site for block in plan.blocks for site in block.pruned):
        assert site.pattern is not None
        kind = site.pattern.kind
        if method.patterns is not None and kind not in method.patterns:
            known = registry.methods.specs.values()
            others = [m.name for m in known if m.patterns is None or kind in m.patterns]
            raise AptError(
                f"method {method.name} does not prune to {site.pattern} ({site.name})",
                f"choose one of {', '.join(others)}" if others else "choose another pattern",
                ("method", "pattern"),
            )


def _allocation(
    allocation: str | Allocation, plan: Plan, registry: Registry
) -> tuple[str, Allocation] | None:
    """The name and the function of an allocation; None if the plan's patterns are final.

    Raises:
        AptError: the name is unknown, or no site has a sparsity that it could change.
    """
    if not isinstance(allocation, str):
        named = name_of("allocation", allocation), allocation
        check_allocation(named[0], plan)
        return named
    spec = registry.allocations.get(allocation)
    check_allocation(spec.name, plan)
    return (spec.name, spec.load()) if is_needed(spec.name, plan) else None


def find_method(method: str | Method | None, registry: Registry) -> tuple[MethodSpec, Method]:
    """A method and its spec; a function has the spec of a method without options."""
    if method is None or isinstance(method, str):
        known = registry.methods
        spec = registry.default_method() if method is None else known.get(method)
        return spec, spec.load()
    name = name_of("method", method)
    return MethodSpec(name, "a function of the caller", "", patterns=None), method
