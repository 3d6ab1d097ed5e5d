"""The plan of a smaller model, before the model is loaded."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from apt.checkpoints.opened import Opened
from apt.checkpoints.smaller import smaller_skeleton
from apt.engine.kept_scores import KeptScores
from apt.engine.machine import choose_device
from apt.engine.prepare import Notice
from apt.engine.prune_model import Pruning
from apt.engine.pruning_plan import settings
from apt.errors import AptError, name_of
from apt.files.journal import Journal
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


def journal_beside(output: Path) -> Journal:
    """The journal beside an output, with the losses that a search has computed.

    Raises:
        AptError: the file is a link, was changed, or is not a journal.
    """
    real = output.resolve()
    place = real.with_name(f".{real.name}.search.jsonl")
    journal = Journal(place, "a search", "move it to another place, or delete it")
    journal.read()
    return journal


def _only_blocks(wish: ShrinkOptions) -> bool:
    """True if no groups are removed."""
    return wish.mode == "depth" or (wish.explicit and not wish.sizes)


def smaller_pruning(
    opened: Opened,
    wish: ShrinkRun,
    options: SolveOptions,
    method: str | Choice | None,
    notice: Notice,
) -> tuple[ShrinkRun, MethodSpec, Pruning]:
    """The pruning to a smaller model, whose structure may still change.

    Args:
        wish: the options of the run, with those of the smaller model.
        options: the options that the weights depend on.
        method: the choice of groups or of blocks, or its name; by default that of the mode.

    Returns:
        The options with a mode, the spec of the method, and the pruning.

    Raises:
        AptError: the method does not fit the mode or does not use an option, or no smaller model
            meets the options.
    """
    model, adapter, config = opened.module, opened.adapter, opened.config
    known = KeptScores.read(wish.scores_from) if wish.scores_from is not None else None
    if known is not None:
        method = _same_method(known, method)
        wish = replace(wish, compensate=False, dense_scores=True, samples=0, own_samples=0)
        options = replace(options, own_samples=0, random_tokens=0)
    named = _found(method, wish) if method else None
    mode, sizes = _wanted(opened, wish, named, notice)
    wish = wish if wish.explicit else replace(wish, mode=mode)
    spec = _resolved(opened, wish, named)
    recipe, augmentation = settings(opened, wish, options, spec, notice)
    choice = _choice(wish, spec, recipe, mode, sizes)
    _check_experts_removed(opened, wish, choice)
    removal = _expert_removal(choice, wish, named=named is not None)
    if known is not None:
        choice = replace(choice, given=known.structure(opened, sizes[0].kept, removal.protect))
        removal = replace(removal, choose=None, scores=known.scores)
    recipe = replace(recipe, experts=removal)
    structure, aware = choice.provisional(model, adapter), recipe.error_aware
    plan = make_structured_plan(model, adapter, config, structure, adjusted=aware)
    if choice.drop:
        smaller_skeleton(model, adapter, plan)  # raises if there is no such model
    job = Pruning(
        adapter, plan, _removal(choice, wish.compensate), recipe, augmentation,
        structure=choice, seed=wish.seed,
    )  # fmt: skip
    return wish, spec, job


def _wanted(
    opened: Opened, wish: ShrinkRun, named: ShrinkMethodSpec | None, notice: Notice
) -> tuple[Mode, list[Size]]:
    """What is removed, and the sizes that meet the wish."""
    family, seconds = (opened.module, opened.adapter, opened.config), None
    if wish.budget == "latency" and not wish.explicit:
        device = choose_device(wish.device)
        notice(f"latency: a block is timed on {device}, with each number of groups of each kind")
        seconds = block_times(*family, device, _PROMPT)

    def sizes_of(multiple: int) -> Sizes:
        return Sizes(*family, multiple, seconds, experts=_chooses_experts(named))

    if named is not None and _chooses_experts(named) and not wish.explicit:
        _check_fit(named, wish, [] if _only_blocks(wish) else [*sizes_of(MULTIPLE).automatic])
    mode, sizes = wanted_sizes(sizes_of, wish, notice, named.chooses if named else None)
    if wish.stream and mode in ("width", "blocks-first") and len(sizes) > 1:
        notice(
            f"size: {sizes[0]}; a streamed run does not compare the {len(sizes)} possible widths"
        )
    return mode, sizes


def _resolved(opened: Opened, wish: ShrinkRun, named: ShrinkMethodSpec | None) -> ShrinkMethodSpec:
    """The method that was named, or the default one of what is removed.

    The method is error-aware by default where blocks are dropped: the others make up for them.
    """
    family = (opened.module, opened.adapter, opened.config)
    sizes = Sizes(*family, MULTIPLE, experts=_chooses_experts(named))
    kinds = [] if _only_blocks(wish) else [*(wish.sizes or sizes.automatic)]
    experts = [kind for kind in kinds if kind in sizes.groups and sizes.groups[kind].routed]
    if named is not None and sizes.groups.keys() >= set(kinds):  # the others are refused by name
        _check_fit(named, wish, experts, others=len(kinds) > len(experts))
    drops = wish.mode in ("search", "blocks-first") or wish.blocks is not None or bool(wish.drop)
    kind: Literal["groups", "experts", "blocks"] = "blocks" if not kinds else "groups"
    kind = "experts" if kinds and experts == kinds else kind
    spec = named or registry().default_shrink_method(kind, streams=wish.stream)
    return replace(spec, error_aware=True) if drops or not kinds else spec


def _chooses_experts(method: ShrinkMethodSpec | None) -> bool:
    """True if a method was named that chooses experts, so that these are what becomes fewer."""
    return method is not None and method.chooses == "experts"


@dataclass(frozen=True)
class _Function(ShrinkMethodSpec):
    """The spec of a function of the caller."""

    function: object = None

    def load(self) -> Any:
        """The function."""
        return self.function


def _found(method: str | Choice, wish: ShrinkOptions) -> ShrinkMethodSpec:
    """The spec of a choice. What a function chooses follows from the number of its arguments."""
    if isinstance(method, str):
        return registry().shrink_methods.get(method)
    name = name_of("method", method)
    taken = [count for count in (2, 3, 4) if _takes(method, count)]
    if len(taken) != 1:
        raise AptError(
            f"method {name} is not a function of 2, of 3 or of 4 arguments",
            "give an apt.extending.ExpertChoice, GroupScores or BlockChoice, or an "
            "apt.solver.GroupChoice",
        )
    chooses: dict[int, Literal["blocks", "columns", "experts", "groups"]] = {
        2: "experts", 3: "groups", 4: "blocks" if _only_blocks(wish) else "columns"
    }  # fmt: skip
    return _Function(
        name, "a function of the caller", "", chooses=chooses[taken[0]], function=method
    )


def _takes(function: Any, count: int) -> bool:
    """True if ``function`` can be called with this number of arguments."""
    try:
        inspect.signature(function).bind(*range(count))
    except (TypeError, ValueError):
        return False
    return True


def _check_fit(
    method: ShrinkMethodSpec, wish: ShrinkOptions, experts: Sequence[str], *, others: bool = True
) -> None:
    """Raise if a method chooses what is not removed, so that it would not be used.

    Args:
        experts: the kinds of experts that become fewer.
        others: False if no other groups become fewer.
    """
    if method.chooses == "experts" and not experts:
        raise AptError(
            f"method {method.name} chooses experts, and none are removed here",
            "give a number of experts, or choose another method",
            ("method", "sizes"),
        )
    blocks = method.chooses == "blocks"
    if _only_blocks(wish) and not blocks:
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
    counted = wish.mode == "blocks-first" or wish.blocks is not None
    if blocks and not _only_blocks(wish) and not counted:
        raise AptError(
            f"method {method.name} chooses blocks, and none are dropped by it here",
            "choose a method for groups, or drop blocks first",
            ("method", "blocks_first"),
        )


def _choice(
    wish: ShrinkRun, method: ShrinkMethodSpec, recipe: Recipe, mode: Mode, sizes: Sequence[Size]
) -> StructureChoice:
    """The choice of the structure of a smaller model, from sizes that meet the wish."""
    own = "groups" if method.chooses == "columns" else method.chooses

    def chosen(kind: Literal["groups", "experts", "blocks"]) -> ShrinkMethodSpec:
        default = registry().default_shrink_method
        return method if kind == own else default(kind, streams=wish.stream)

    return StructureChoice(
        mode,
        sizes,
        chosen("groups"),
        chosen("experts"),
        chosen("blocks"),
        recipe.solver,
        whole=not wish.stream,
        drop=tuple(wish.drop),
        search=SearchOptions(wish.evaluations, wish.minutes),
        seed=wish.seed,
    )


def _removal(choice: StructureChoice, compensate: bool | None) -> GroupRemoval:
    """The method of the sites: the removal of groups that ``choice`` has chosen or leaves open."""
    spec = choice.groups
    exact = spec.compensate if compensate is None else compensate
    return GroupRemoval(spec.load() if spec.chooses == "columns" else joint_removal, exact)


def _expert_removal(choice: StructureChoice, wish: ShrinkRun, *, named: bool) -> ExpertRemoval:
    """How the experts become fewer, of which ``choice`` may have chosen some."""
    scored, spec = choice.groups.chooses == "groups", choice.experts
    usual = (choice.groups if scored else spec).compensate
    exact = usual if wish.compensate is None else wish.compensate
    known = labels([source.name for source in text_sources(wish.calibration)])
    protect = tuple(known[name] for name in wish.protect)
    return ExpertRemoval(
        spec.load(), spec.merges, exact, named, protect, wish.expert_tokens, wish.dense_scores
    )


def _same_method(known: KeptScores, method: str | Choice | None) -> str | Choice:
    """The method that gave the scores; raises if another one is named."""
    if method is not None and method != known.method:
        fault = f"the scores in {known.place} are those of the method {known.method}"
        raise AptError(fault, "leave the method out", ("method", "scores_from"))
    return known.method


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
        fault = "dense scores are not known where blocks are dropped"
        raise AptError(fault, "leave one of them out", ("dense_scores", "drop"))


def _check_experts_removed(opened: Opened, wish: ShrinkRun, choice: StructureChoice) -> None:
    """Raise for options of the choice of experts in a run that removes none."""
    groups = Sizes(opened.module, opened.adapter, opened.config, MULTIPLE, experts=True).groups
    if any(groups[kind].routed for kind in choice.kinds if kind in groups):
        if wish.dense_scores:
            _check_dense_scores(choice, opened)
        return
    for name in ("protect", "expert_tokens", "dense_scores"):
        if getattr(wish, name):
            words = name.replace("_", " ")
            fault = f"{words} has no effect: no experts are removed here"
            raise AptError(fault, "leave it out, or give a number of experts", (name, "sizes"))
