"""The plan of a smaller model, before the model is loaded."""

from collections.abc import Callable

from apt.checkpoints.model import Model
from apt.errors import AptError
from apt.planning.plan import Plan
from apt.planning.structure import make_structured_plan
from apt.plugin.registry import Registry
from apt.plugin.specs import MethodSpec, ShrinkMethodSpec
from apt.pruning.recipe import Recipe
from apt.runs.options import RunOptions
from apt.shrinking.sizes import Sizes
from apt.shrinking.structure_choice import StructureChoice
from apt.shrinking.wanted_sizes import wanted_sizes
from apt.solver import GroupRemoval, joint_removal


def find_method(options: RunOptions, registry: Registry) -> MethodSpec:
    """The method of a run: of sparse pruning, or of the choice of a smaller model."""
    if options.shrink is None:
        return registry.methods.get(options.method) if options.method else registry.default_method()
    if options.method:
        return registry.shrink_methods.get(options.method)
    by_blocks = options.shrink.mode == "depth"
    return registry.default_shrink_method(blocks=by_blocks, streams=options.stream)


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
    if shell.checkpoint is not None:
        raise AptError(
            f"{shell.source.reference} is not in the format of transformers",
            "convert it first with apt-prune convert",
        )
    choice = choice_of(options, shell, method, recipe, registry, notice)
    structure = choice.provisional(shell.module, shell.adapter)
    plan = make_structured_plan(
        shell.module, shell.adapter, shell.config, structure,
        adjusted=recipe.targets is not None,
    )  # fmt: skip
    return choice, plan


def choice_of(
    options: RunOptions,
    shell: Model,
    method: MethodSpec,
    recipe: Recipe,
    registry: Registry,
    notice: Callable[[str], None],
) -> StructureChoice:
    """The choice of the structure of a smaller model."""
    wish = options.shrink
    assert wish is not None
    assert isinstance(method, ShrinkMethodSpec)

    def sizes(multiple: int) -> Sizes:
        return Sizes(shell.module, shell.adapter, shell.config, multiple)

    mode, found = wanted_sizes(sizes, wish, notice)
    by_blocks = method.chooses == "blocks"
    if by_blocks and mode != "depth":
        raise AptError(
            f"method {method.name} chooses blocks, and nothing else is dropped here",
            "choose a method for groups, or drop blocks only",
            ("method", "depth_only"),
        )
    others = registry.default_shrink_method(blocks=not by_blocks, streams=options.stream)
    groups, blocks = (others, method) if by_blocks else (method, others)
    return StructureChoice(
        mode,
        found,
        groups,
        blocks,
        recipe.solver,
        whole=not options.stream,
        search=wish.search,
        seed=options.seed,
    )


def removal(choice: StructureChoice, compensate: bool | None) -> GroupRemoval:
    """The method of the sites: the removal of groups that ``choice`` has chosen or leaves open."""
    spec = choice.groups
    exact = spec.compensate if compensate is None else compensate
    return GroupRemoval(spec.load() if spec.chooses == "columns" else joint_removal, exact)
