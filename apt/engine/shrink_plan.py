"""The plan of a smaller model, before the model is loaded."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from apt.checkpoints.opened import Opened
from apt.checkpoints.smaller import smaller_skeleton
from apt.engine.kept_scores import KeptScores
from apt.engine.machine import choose_device
from apt.engine.prepare import Notice
from apt.engine.prune_model import Pruning
from apt.engine.pruning_plan import settings
from apt.errors import AptError, name_of
from apt.locations.text_sources import labels, text_sources
from apt.options import Mode, ShrinkOptions, ShrinkRun, SolveOptions
from apt.planning.structure import make_structured_plan
from apt.plugin.registry import registry
from apt.plugin.specs import MethodSpec, ShrinkMethodSpec
from apt.pruning.expert_choice import ExpertChoice, ExpertRemoval, LowestScores
from apt.pruning.layer import Recipe
from apt.shrinking.latency import block_times
from apt.shrinking.search import SearchOptions
from apt.shrinking.sizes import MULTIPLE, Size, Sizes
from apt.shrinking.structure_choice import BlockChoice, GroupScores, StructureChoice
from apt.shrinking.wanted_sizes import wanted_sizes
from apt.solver import GroupChoice, GroupRemoval, joint_removal

Choice = GroupChoice | ExpertChoice | GroupScores | BlockChoice
"""A choice of what to remove."""

_PROMPT = 512  # tokens of the sample on which a latency is measured


def _only_blocks(run: ShrinkOptions) -> bool:
    """True if blocks are dropped and no groups are removed."""
    return run.mode == "depth" or (run.explicit and not run.sizes)


def smaller_pruning(
    opened: Opened,
    run: ShrinkRun,
    options: SolveOptions,
    method: str | Choice | None,
    notice: Notice,
) -> tuple[ShrinkRun, MethodSpec, Pruning]:
    """The pruning to a smaller model, whose structure may still change.

    Args:
        run: the options of the run, with the options of the smaller model.
        options: the options that the weights depend on.
        method: the choice of groups or of blocks, or its name; by default the choice of the mode.

    Returns:
        The options with a mode, the spec of the method, and the pruning.

    Raises:
        AptError: the method does not fit the mode or does not use an option, or no smaller model
            meets the options.
    """
    model, adapter, config = opened.module, opened.adapter, opened.config
    kept_scores = KeptScores.read(run.scores_from) if run.scores_from is not None else None
    if kept_scores is not None:
        method = _same_method(kept_scores, method)
        run = replace(run, compensate=False, dense_scores=True, samples=0, own_samples=0)
        options = replace(options, own_samples=0, random_tokens=0)
    named = _named_spec(method, run) if method else None
    mode, sizes = _mode_and_sizes(opened, run, named, notice)
    run = run if run.explicit else replace(run, mode=mode)
    spec = _method_spec(opened, run, named)
    recipe, augmentation = settings(opened, run, options, spec, notice)
    choice = _choice(run, spec, recipe, mode, sizes)
    _check_experts_removed(opened, run, choice)
    removal = _expert_removal(choice, run, named=named is not None)
    if kept_scores is not None:
        structure = kept_scores.structure(opened, sizes[0].kept, removal.protect)
        choice = replace(choice, known_structure=structure)
        removal = replace(removal, choose=None, scores=kept_scores.scores)
    recipe = replace(recipe, experts=removal)
    structure, aware = choice.provisional(model, adapter), recipe.error_aware
    plan = make_structured_plan(model, adapter, config, structure, adjusted=aware)
    if choice.drop:
        smaller_skeleton(model, adapter, plan)  # raises if there is no such model
    job = Pruning(
        adapter, plan, _removal(choice, run.compensate), recipe, augmentation,
        structure=choice, seed=run.seed,
    )  # fmt: skip
    return run, spec, job


def _mode_and_sizes(
    opened: Opened, run: ShrinkRun, named: ShrinkMethodSpec | None, notice: Notice
) -> tuple[Mode, list[Size]]:
    """The mode, and the sizes that meet the options."""
    family, seconds = (opened.module, opened.adapter, opened.config), None
    if run.budget == "latency" and not run.explicit:
        device = choose_device(run.device)
        notice(f"latency: a block is timed on {device}, with each number of groups of each kind")
        seconds = block_times(*family, device, _PROMPT)

    def sizes_of(multiple: int) -> Sizes:
        return Sizes(*family, multiple, seconds, experts=_chooses_experts(named))

    if named is not None and _chooses_experts(named) and not run.explicit:
        _check_fit(named, run, [] if _only_blocks(run) else [*sizes_of(MULTIPLE).automatic])
    mode, sizes = wanted_sizes(sizes_of, run, notice, named.chooses if named else None)
    if run.stream and mode in ("width", "blocks-first") and len(sizes) > 1:
        notice(
            f"size: {sizes[0]}; a streamed run does not compare the {len(sizes)} possible widths"
        )
    return mode, sizes


def _method_spec(
    opened: Opened, run: ShrinkRun, named: ShrinkMethodSpec | None
) -> ShrinkMethodSpec:
    """The named method, or the default method for the parts that are removed.

    If blocks are dropped, the run is error-aware by default: the kept blocks compensate.
    """
    family = (opened.module, opened.adapter, opened.config)
    sizes = Sizes(*family, MULTIPLE, experts=_chooses_experts(named))
    kinds = [] if _only_blocks(run) else [*(run.sizes or sizes.automatic)]
    experts = [kind for kind in kinds if kind in sizes.groups and sizes.groups[kind].routed]
    if named is not None and sizes.groups.keys() >= set(kinds):  # other kinds are errors later
        _check_fit(named, run, experts, others=len(kinds) > len(experts))
    drops = run.mode in ("search", "blocks-first") or run.blocks is not None or bool(run.drop)
    chosen: Literal["groups", "experts", "blocks"] = "blocks" if not kinds else "groups"
    chosen = "experts" if kinds and experts == kinds else chosen
    spec = named or registry().default_shrink_method(chosen, streams=run.stream)
    return replace(spec, error_aware=True) if drops or not kinds else spec


def _chooses_experts(method: ShrinkMethodSpec | None) -> bool:
    """True if the named method chooses experts: experts are then removed."""
    return method is not None and method.chooses == "experts"


@dataclass(frozen=True)
class _Function(ShrinkMethodSpec):
    """The spec of a function of the caller."""

    function: object = None

    def load(self) -> Any:
        """The function."""
        return self.function


def _named_spec(method: str | Choice, run: ShrinkOptions) -> ShrinkMethodSpec:
    """The spec of a choice. The number of its arguments tells what a function chooses."""
    if isinstance(method, str):
        return registry().shrink_methods.get(method)
    name = name_of("method", method)
    counts = [count for count in (2, 3, 4) if _takes(method, count)]
    if len(counts) != 1:
        raise AptError(
            f"method {name} is not a function of 2, of 3 or of 4 arguments",
            "give an apt.extending.ExpertChoice, GroupScores or BlockChoice, or an "
            "apt.solver.GroupChoice",
        )
    chooses: dict[int, Literal["blocks", "columns", "experts", "groups"]] = {
        2: "experts", 3: "groups", 4: "blocks" if _only_blocks(run) else "columns"
    }  # fmt: skip
    return _Function(
        name, "a function of the caller", "", chooses=chooses[counts[0]], function=method
    )


def _takes(function: Any, count: int) -> bool:
    """True if ``function`` can be called with this number of arguments."""
    try:
        inspect.signature(function).bind(*range(count))
    except (TypeError, ValueError):
        return False
    return True


def _check_fit(
    method: ShrinkMethodSpec, run: ShrinkOptions, experts: Sequence[str], *, others: bool = True
) -> None:
    """Raise if a method chooses parts that are not removed: it would have no effect.

    Args:
        experts: the kinds of experts that are removed.
        others: False if no other groups are removed.
    """
    if method.chooses == "experts" and not experts:
        raise AptError(
            f"method {method.name} chooses experts, and none are removed here",
            "give a number of experts, or choose another method",
            ("method", "sizes"),
        )
    blocks = method.chooses == "blocks"
    if _only_blocks(run) and not blocks:
        raise AptError(
            f"method {method.name} chooses groups, and only blocks are dropped here",
            "choose a method for blocks",
            ("method", "depth_only"),
        )
    if method.chooses == "columns" and experts and not others:
        raise AptError(
            f"method {method.name} chooses columns of weights, and only experts are removed here",
            "choose a method for experts, or remove other groups too",
            ("method", "sizes"),
        )
    by_number = run.mode == "blocks-first" or run.blocks is not None
    if blocks and not _only_blocks(run) and not by_number:
        raise AptError(
            f"method {method.name} chooses blocks, and none are dropped by it here",
            "choose a method for groups, or drop blocks first",
            ("method", "blocks_first"),
        )


def _choice(
    run: ShrinkRun, method: ShrinkMethodSpec, recipe: Recipe, mode: Mode, sizes: Sequence[Size]
) -> StructureChoice:
    """The choice of the structure of a smaller model, from sizes that meet the options."""
    chosen_kind = "groups" if method.chooses == "columns" else method.chooses

    def spec_for(kind: Literal["groups", "experts", "blocks"]) -> ShrinkMethodSpec:
        default = registry().default_shrink_method
        return method if kind == chosen_kind else default(kind, streams=run.stream)

    return StructureChoice(
        mode,
        sizes,
        spec_for("groups"),
        spec_for("experts"),
        spec_for("blocks"),
        recipe.solver,
        whole=not run.stream,
        drop=tuple(run.drop),
        search=SearchOptions(run.evaluations, run.minutes),
        seed=run.seed,
    )


def _removal(choice: StructureChoice, compensate: bool | None) -> GroupRemoval:
    """The method of the sites: the removal of groups, which it may choose itself."""
    spec = choice.groups
    exact = spec.compensate if compensate is None else compensate
    return GroupRemoval(spec.load() if spec.chooses == "columns" else joint_removal, exact)


def _expert_removal(choice: StructureChoice, run: ShrinkRun, *, named: bool) -> ExpertRemoval:
    """The removal of experts, with the compensation of its method by default."""
    by_scores, spec = choice.groups.chooses == "groups", choice.experts
    default = (choice.groups if by_scores else spec).compensate
    exact = default if run.compensate is None else run.compensate
    names = labels([source.name for source in text_sources(run.calibration)])
    protect = tuple(names[name] for name in run.protect)
    return ExpertRemoval(
        spec.load(), spec.merges, exact, named, protect, run.expert_tokens, run.dense_scores
    )


def _same_method(kept_scores: KeptScores, method: str | Choice | None) -> str | Choice:
    """The method that computed the scores; raises if another method is named."""
    if method is not None and method != kept_scores.method:
        message = f"method {kept_scores.method} computed the scores in {kept_scores.place}"
        raise AptError(message, "leave the method out", ("method", "scores_from"))
    return kept_scores.method


def _check_dense_scores(choice: StructureChoice, opened: Opened) -> None:
    """Raise if the scores of experts in the dense model could not be used."""
    if not isinstance(choice.experts.load(), LowestScores):
        raise AptError(
            f"method {choice.experts.name} does not score experts one by one",
            "leave dense scores out, or choose another method",
            ("dense_scores", "method"),
        )
    blocks = len(opened.adapter.blocks(opened.module))
    if choice.drop or choice.mode == "search" or any(s.blocks < blocks for s in choice.sizes):
        message = "dense scores are not known where blocks are dropped"
        raise AptError(message, "leave one of them out", ("dense_scores", "drop"))


def _check_experts_removed(opened: Opened, run: ShrinkRun, choice: StructureChoice) -> None:
    """Raise for options of the choice of experts in a run that removes none."""
    groups = Sizes(opened.module, opened.adapter, opened.config, MULTIPLE, experts=True).groups
    if any(groups[kind].routed for kind in choice.kinds if kind in groups):
        if run.dense_scores:
            _check_dense_scores(choice, opened)
        return
    for name in ("protect", "expert_tokens", "dense_scores"):
        if getattr(run, name):
            message = f"{name.replace('_', ' ')} has no effect: no experts are removed here"
            raise AptError(message, "leave it out, or give a number of experts", (name, "sizes"))
