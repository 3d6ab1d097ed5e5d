"""The plan and the settings of a pruning, from its options, for runs and for programs."""

from dataclasses import replace
from typing import Any

from apt.checkpoints.opened import Opened
from apt.engine.prepare import Notice
from apt.engine.prune_model import Pruning
from apt.engine.recipes import (
    augmentation_of,
    for_samples,
    grid_of,
    norm_tuning_of,
    prefers_own_text,
    recipe_of,
)
from apt.errors import AptError, name_of
from apt.options import FitRun, PruneOptions, PruneRun, SampleOptions, SolveOptions
from apt.patterns import Pattern, Unstructured, keeps_all
from apt.planning.allocation import (
    Allocation,
    check_allocation,
    default_allocation,
    is_needed,
    unstructured,
)
from apt.planning.permutable import with_permutable
from apt.planning.plan import Plan, Selection, check_rounding, make_plan, tell_idle, tell_shared
from apt.plugin.registry import registry
from apt.plugin.specs import UNIFORM, MethodSpec, ShrinkMethodSpec
from apt.pruning.layer import Method, Recipe
from apt.text.augmentation import Augmentation
from apt.text.ids import vocabulary_size
from apt.text.self_generated import writes


def settings(
    opened: Opened,
    run: SampleOptions,
    options: SolveOptions,
    method: MethodSpec,
    notice: Notice,
    *,
    generates: bool = False,
) -> tuple[Recipe, Augmentation]:
    """The settings of the loop over blocks, with all defaults filled in.

    Args:
        generates: see `apt.engine.recipes.augmentation_of`.

    Raises:
        AptError: the method does not use an option.
    """
    smaller = isinstance(method, ShrinkMethodSpec)
    catalog: Any = registry().shrink_methods if smaller else registry().methods
    options.check_used(method, catalog.specs.values(), "method")
    if not opened.reads.windows:
        options = for_samples(options, method)
    recipe = recipe_of(options, method)
    augmentation = augmentation_of(options, method, run.samples, run.seqlen, generates=generates)
    if not opened.reads.windows:
        return recipe, _without_own_text(opened, options, augmentation)
    if options.own_samples is not None or not augmentation.own_samples or writes(opened.module):
        return recipe, augmentation
    kind = type(opened.module).__name__
    notice(f"own samples: 0 (not {augmentation.own_samples}: {kind} cannot generate text)")
    return recipe, replace(augmentation, own_samples=0)


def _without_own_text(
    opened: Opened, options: SolveOptions, augmentation: Augmentation
) -> Augmentation:
    """The augmentation of a model that does not generate its samples.

    Raises:
        AptError: an option asks for samples that the model cannot have.
    """
    reads, kind = opened.reads, type(opened.module).__name__
    if options.own_samples:
        message = f"own samples has no effect on {kind}"
        raise AptError(message, "leave it out: it is for decoders of text", ("own_samples",))
    reads_text = bool(reads.text) and not reads.image
    if reads_text and vocabulary_size(opened.module) is not None:
        return replace(augmentation, own_samples=0)
    if options.random_tokens:
        why = (
            "whose tokens have no known embeddings" if reads_text else f"which reads {reads.words}"
        )
        message = f"random tokens has no effect on {kind}, {why}"
        raise AptError(message, "leave it out", ("random_tokens",))
    return Augmentation()


def sparse_pruning(
    opened: Opened,
    run: PruneRun,
    pattern: Pattern,
    selection: Selection,
    method: str | Method | None,
    allocation: str | Allocation | None,
    notice: Notice,
) -> tuple[MethodSpec, Pruning]:
    """The pruning to a sparse model, with the spec of its method.

    A program may give functions and patterns in place of the names in ``run``.

    Raises:
        AptError: the method does not use an option, or the pattern does not fit the model.
    """
    spec, function = _method(method)
    options, generates = run, prefers_own_text(run, opened)
    if keeps_all(pattern):  # tuning and more samples compensate for pruned weights
        epochs, copies = run.tuning_epochs or 0, run.random_tokens or 0
        options = replace(
            run, tuning_epochs=epochs, random_tokens=copies, norm_epochs=run.norm_epochs or 0
        )
        generates = False
    recipe, augmentation = settings(opened, run, options, spec, notice, generates=generates)
    model, adapter = opened.module, opened.adapter
    grid = grid_of(run)
    plan = make_plan(model, adapter, pattern, selection, spec.per, run.also, grid)
    _check_method(plan, spec)
    tell_shared(plan, notice)
    tell_idle(adapter, model, notice)
    check_rounding(plan, notice, grid is not None)
    if recipe.permute:
        plan = with_permutable(plan, model, adapter, opened.config)
    _check_effects(run, recipe, plan)
    if allocation is None:
        aware = recipe.error_aware and spec.error_aware and bool(unstructured(plan))
        allocation = default_allocation(pattern, error_aware=aware)
        if allocation != UNIFORM:
            notice(f"allocation: {allocation} (default)")
    allocation_pair, norms = _allocation(allocation, plan), norm_tuning_of(options, spec, opened)
    return spec, Pruning(
        adapter, plan, function, recipe, augmentation, allocation_pair, norms=norms, seed=run.seed
    )


def fit_job(skeleton: Opened, options: FitRun, notice: Notice, *, zeros: bool = False) -> Pruning:
    """The loop over blocks that solves each site.

    Args:
        zeros: True if weights may be removed. Only then there are tuning and random tokens by
            default, which compensate for them.
    """
    spec, chosen = registry().default_method(), options
    if not zeros:
        epochs, copies = options.tuning_epochs or 0, options.random_tokens or 0
        chosen = replace(options, tuning_epochs=epochs, random_tokens=copies)
    recipe, augmentation = settings(skeleton, chosen, chosen, spec, notice)
    recipe = replace(recipe, permute=False)
    if not zeros:
        recipe = replace(recipe, row_importance=None)
    plan = make_plan(skeleton.module, skeleton.adapter, Unstructured(0.0), per=spec.per)
    return Pruning(skeleton.adapter, plan, spec.load(), recipe, augmentation, seed=options.seed)


def _check_effects(options: PruneOptions, recipe: Recipe, plan: Plan) -> None:
    """Raise for an option that no site of a plan uses."""
    if options.permute and not any(block.permutable for block in plan.blocks):
        message = "permute has no effect: no n:m site has inputs that can change places"
        raise AptError(message, "leave it out", ("permute",))
    rows = recipe.row_importance
    is_served = (rows is not None and rows.serves(site.site, site.pattern) for site in plan.sites)
    if options.row_importance and rows and not any(is_served):
        message = "row importance has no effect: every row of every site keeps as many weights"
        raise AptError(message, "leave it out", ("row_importance",))


def _check_method(plan: Plan, method: MethodSpec) -> None:
    """Raise if a method does not prune to the pattern of a site."""
    for site in (site for block in plan.blocks for site in block.pruned):
        assert site.pattern is not None
        kind = site.pattern.kind
        if method.patterns is not None and kind not in method.patterns:
            methods = registry().methods.specs.values()
            others = [m.name for m in methods if m.patterns is None or kind in m.patterns]
            raise AptError(
                f"method {method.name} does not prune to {site.pattern} ({site.name})",
                f"choose one of {', '.join(others)}" if others else "choose another pattern",
                ("method", "pattern"),
            )


def _allocation(allocation: str | Allocation, plan: Plan) -> tuple[str, Allocation] | None:
    """The name and the function of an allocation; None if the plan's patterns are final.

    Raises:
        AptError: the name is unknown, or the allocation could change no site.
    """
    if not isinstance(allocation, str):
        pair = name_of("allocation", allocation), allocation
        check_allocation(pair[0], plan)
        return pair
    spec = registry().allocations.get(allocation)
    check_allocation(spec.name, plan)
    return (spec.name, spec.load()) if is_needed(spec.name, plan) else None


def _method(method: str | Method | None) -> tuple[MethodSpec, Method]:
    """A method and its spec. The spec of a function has no options."""
    if method is None or isinstance(method, str):
        plugins = registry()
        spec = plugins.default_method() if method is None else plugins.methods.get(method)
        return spec, spec.load()
    name = name_of("method", method)
    return MethodSpec(name, "a function of the caller", "", patterns=None), method
