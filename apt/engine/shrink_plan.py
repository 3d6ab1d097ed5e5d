"""The plan of a smaller model, before the model is loaded."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from apt.adapter import Adapter
from apt.checkpoints.model import Model
from apt.checkpoints.smaller import empty_smaller
from apt.engine.machine import choose_device
from apt.engine.options import RunOptions
from apt.errors import AptError, name_of
from apt.files.journal import Journal
from apt.planning.plan import Plan
from apt.planning.structure import make_structured_plan
from apt.plugin.registry import Registry
from apt.plugin.specs import MethodSpec, ShrinkMethodSpec
from apt.pruning.layer import Recipe
from apt.shrinking.latency import block_times
from apt.shrinking.options import ShrinkOptions
from apt.shrinking.sizes import MULTIPLE, Sizes
from apt.shrinking.structure_choice import BlockChoice, GroupScores, StructureChoice
from apt.shrinking.wanted_sizes import wanted_sizes, with_mode
from apt.solver import GroupChoice, GroupRemoval, joint_removal

Choice = GroupChoice | GroupScores | BlockChoice
"""A choice of what to remove."""

_PROMPT = 512  # tokens of the sample on which a latency is measured


def _journal_beside(output: Path) -> Journal:
    """The journal beside an output, with the losses that a search has computed.

    Raises:
        AptError: the file is a link, was changed, or is not a journal.
    """
    real = output.resolve()
    place = real.with_name(f".{real.name}.search.jsonl")
    journal = Journal(place, "a search", "move it to another place, or delete it")
    journal.read()
    return journal


def find_method(options: RunOptions, registry: Registry) -> MethodSpec:
    """The method of a run: of sparse pruning, or of the choice of a smaller model."""
    name, wish = options.method, options.shrink
    if wish is None:
        return registry.methods.get(name) if name else registry.default_method()
    if name:
        return registry.shrink_methods.get(name)
    return registry.default_shrink_method(blocks=_only_blocks(wish), streams=options.stream)


def _only_blocks(wish: ShrinkOptions) -> bool:
    """True if no groups are removed."""
    return wish.mode == "depth" or (wish.explicit and not wish.sizes)


def resolved(
    wish: ShrinkOptions,
    method: str | Choice | None,
    model: nn.Module,
    adapter: Adapter,
    config: Any,
    registry: Registry,
    notice: Callable[[str], None] = lambda line: None,
    *,
    streams: bool = False,
) -> tuple[ShrinkOptions, ShrinkMethodSpec]:
    """The options with a mode, and the method with that name, or the default one of the mode.

    The method is error-aware by default where blocks are dropped: the others make up for them.

    Args:
        wish: the options of the smaller model.
        method: the choice of groups or of blocks, or its name.
        model: the model; it may be on the meta device.
        adapter: the adapter of its family.
        config: its configuration.
        registry: the plugins.
        notice: called with a line about the mode, if it is a default.
        streams: True if the blocks stay on disk.

    Raises:
        AptError: an option is out of range, or the method does not fit the mode.
    """
    wish.check()
    found = _found(method, wish, registry) if method else None
    sizes = Sizes(model, adapter, config, wish.multiple_of or MULTIPLE)
    known, wish = wish, with_mode(wish, sizes, found.chooses if found else None)
    if wish.mode != known.mode:
        notice(f"mode: {wish.mode} (default)")
    if found is not None:
        _check_fit(found, wish)
    blocks = _only_blocks(wish)
    drops = blocks or wish.blocks is not None or bool(wish.drop) or wish.mode == "search"
    spec = found or registry.default_shrink_method(blocks=blocks, streams=streams)
    return wish, replace(spec, error_aware=True) if drops else spec


@dataclass(frozen=True)
class _Function(ShrinkMethodSpec):
    """The spec of a function of the caller."""

    function: object = None

    def load(self) -> Any:
        """The function."""
        return self.function


def _found(method: str | Choice, wish: ShrinkOptions, registry: Registry) -> ShrinkMethodSpec:
    """The spec of a choice. What a function chooses follows from the number of its arguments."""
    if isinstance(method, str):
        return registry.shrink_methods.get(method)
    name = name_of("method", method)
    taken = [count for count in (3, 4) if _takes(method, count)]
    if len(taken) != 1:
        raise AptError(
            f"method {name} is not a function of 3 or of 4 arguments",
            "give an apt.extending.GroupScores or BlockChoice, or an apt.solver.GroupChoice",
        )
    of_four: Literal["blocks", "columns"] = "blocks" if _only_blocks(wish) else "columns"
    chooses = "groups" if taken == [3] else of_four
    return _Function(name, "a function of the caller", "", chooses=chooses, function=method)


def _takes(function: Any, count: int) -> bool:
    """True if ``function`` can be called with this number of arguments."""
    try:
        inspect.signature(function).bind(*range(count))
    except (TypeError, ValueError):
        return False
    return True


def _check_fit(method: ShrinkMethodSpec, wish: ShrinkOptions) -> None:
    """Raise if a method chooses what is not removed."""
    blocks = method.chooses == "blocks"
    if _only_blocks(wish) and not blocks:
        raise AptError(
            f"method {method.name} chooses groups, and only blocks are dropped here",
            "choose a method for blocks",
            ("method", "depth_only"),
        )
    if blocks and not _only_blocks(wish):
        raise AptError(
            f"method {method.name} chooses blocks, and nothing else is dropped here",
            "choose a method for groups, or drop blocks only",
            ("method", "depth_only"),
        )


def shrinking(
    options: RunOptions,
    shell: Model,
    method: MethodSpec,
    recipe: Recipe,
    registry: Registry,
    notice: Callable[[str], None],
) -> tuple[StructureChoice, Plan]:
    """The choice of the structure of a smaller model, and a plan that it may still change.

    Raises:
        AptError: no smaller model meets the options, or the checkpoint has a format of its own.
    """
    assert options.shrink is not None
    assert isinstance(method, ShrinkMethodSpec)
    if shell.checkpoint is not None:
        raise AptError(
            f"{shell.source.reference} is not in the format of transformers",
            "convert it first with apt-prune convert",
        )
    family = (shell.module, shell.adapter, shell.config)
    choice = choice_of(
        options.shrink, *family, method, recipe, registry, notice,
        streams=options.stream, seed=options.seed, device=options.device,
    )  # fmt: skip
    if choice.mode == "search":
        choice = replace(choice, journal=_journal_beside(options.output))
    structure = choice.provisional(shell.module, shell.adapter)
    plan = make_structured_plan(*family, structure, adjusted=recipe.targets is not None)
    if choice.drop:
        empty_smaller(shell.module, shell.adapter, plan)  # raises if there is no such model
    return choice, plan


def choice_of(
    wish: ShrinkOptions,
    model: nn.Module,
    adapter: Adapter,
    config: Any,
    method: ShrinkMethodSpec,
    recipe: Recipe,
    registry: Registry,
    notice: Callable[[str], None] = lambda line: None,
    *,
    streams: bool = False,
    seed: int = 0,
    device: str = "auto",
) -> StructureChoice:
    """The choice of the structure of a smaller model.

    Args:
        wish: the options of the smaller model.
        model: the model; it may be on the meta device.
        adapter: the adapter of its family.
        config: its configuration.
        method: the choice of groups or of blocks.
        recipe: the settings of the run.
        registry: the plugins.
        notice: called with a line about each choice that the user did not make.
        streams: True if the blocks stay on disk.
        seed: the seed of a search.
        device: the device on which a latency is measured.
    """
    seconds = None
    if wish.budget == "latency" and not wish.explicit:
        device = choose_device(device)
        notice(f"latency: a block is timed on {device}, with each number of groups of each kind")
        seconds = block_times(model, adapter, config, device, _PROMPT)
    mode, found = wanted_sizes(
        lambda multiple: Sizes(model, adapter, config, multiple, seconds), wish, notice
    )
    if streams and mode == "width" and len(found) > 1:
        notice(
            f"size: {found[0]}; a streamed run does not compare the {len(found)} possible widths"
        )
    by_blocks = method.chooses == "blocks"
    others = registry.default_shrink_method(blocks=not by_blocks, streams=streams)
    groups, blocks = (others, method) if by_blocks else (method, others)
    return StructureChoice(
        mode,
        found,
        groups,
        blocks,
        recipe.solver,
        whole=not streams,
        drop=tuple(wish.drop),
        search=wish.search,
        seed=seed,
    )


def removal(choice: StructureChoice, compensate: bool | None) -> GroupRemoval:
    """The method of the sites: the removal of groups that ``choice`` has chosen or leaves open."""
    spec = choice.groups
    exact = spec.compensate if compensate is None else compensate
    return GroupRemoval(spec.load() if spec.chooses == "columns" else joint_removal, exact)
