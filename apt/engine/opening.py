"""The names in the options of a run: plugins, the model, the pattern. Most need no torch."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from apt.errors import AptError
from apt.locations.hub import Hub
from apt.locations.model_source import Source, find
from apt.options import (
    ExportRun,
    MeasuringOptions,
    ModelRun,
    PatternOptions,
    PruneRun,
    ReapplyRun,
    RecoverRun,
    RemoteOptions,
    ShrinkRun,
)
from apt.plugin.registry import Registry
from apt.plugin.specs import ExportSpec

if TYPE_CHECKING:
    from apt.patterns import Pattern
    from apt.planning.plan import Selection

AnyRun = PruneRun | ShrinkRun | RecoverRun | ReapplyRun
R = TypeVar("R", bound=AnyRun)
W = TypeVar("W", bound=PruneRun | ShrinkRun | RecoverRun)

PER_ALLOCATION = {"block": "auto-block", "model": "auto"}
"""The allocations of the units of a sparsity that several sites share."""


@dataclass(frozen=True)
class Named(Generic[R]):
    """The options of a run with the names of plugins as declared, and the place of its model."""

    options: R
    source: Source


def find_source(reference: str, options: RemoteOptions, registry: Registry) -> Source:
    """The location of a model. For a model on the hub, the hub is contacted.

    Raises:
        AptError: there is no such model.
    """
    trust, hub = options.trust_remote_code, Hub(options.revision)
    return find(reference, registry, trust_remote_code=trust, hub=hub)


def check_export(
    run: ExportRun, registry: Registry, options: tuple[str, ...] = ("format",)
) -> ExportSpec:
    """The format of an export: the given one, or the one of the suffix of the output.

    ``options`` choose the format, for the message.

    Raises:
        AptError: there is none, or it needs a package that is not installed; or the output has
            another suffix, or the type does not exist.
    """
    known = registry.exports
    if run.format is not None:
        spec = known.get(run.format)
    else:
        fitting = [one for one in known.specs.values() if run.output.suffix == one.suffix]
        if len(fitting) != 1:
            kinds = ", ".join(f"{one.name} ({one.suffix})" for one in known.specs.values())
            fault = f"the suffix of {run.output} does not say the format"
            raise AptError(fault, f"choose one: {kinds or 'none is installed'}", options)
        spec = fitting[0]
    if run.output.suffix != spec.suffix:
        fault = f"the output {run.output} is not a {spec.suffix} file"
        raise AptError(fault, "choose another name", ("output",))
    if run.type is not None and run.type not in spec.types:
        types = ", ".join(spec.types) or "none to choose from"
        raise AptError(f"{spec.name} has no type '{run.type}'", f"it writes {types}", ("type",))
    for module in spec.requires:
        if find_spec(module) is None:
            raise AptError(f"{spec.name} files need the package {module}", spec.install)
    return spec


def check_directory_name(output: Path, registry: Registry) -> None:
    """Raise if a directory would have the name of a file that an export writes."""
    for spec in registry.exports.specs.values():
        if output.suffix == spec.suffix:
            raise AptError(
                f"the output {output} is a directory, in the format of transformers",
                f"name it {output.stem}, and then: apt-prune export {output.stem} -o {output}",
                ("output",),
            )


def with_names(options: R, registry: Registry, notice: Callable[[str], None]) -> Named[R]:
    """The options with a model, a text and an output, and the place of the model.

    ``notice`` is called with a line about each default.

    Raises:
        AptError: a name is unknown, or the model is not found.
    """
    if isinstance(options, ReapplyRun):
        return Named(options, find_source(options.model, options, registry))
    made: Any = options

    def choose(**values: Any) -> None:
        nonlocal made
        for name, value in values.items():
            notice(f"{name}: {value} (default)")
        made = replace(made, **values)

    _check_packages(options)
    if not options.model and not isinstance(options, RecoverRun):
        choose(model=_embedded(options, registry))
    made = replace(made, metrics=_metrics(options, registry), **_plugin(options, registry))
    source = find_source(made.model, options, registry)
    if isinstance(options, PruneRun):
        if pattern_of(options) is None:
            choose(pattern="2:4")
        made = replace(made, allocation=_allocation(made, registry))
    if options.calibration == MeasuringOptions.calibration:
        notice(f"calibration: {options.calibration} (default)")
    if options.output is None:
        choose(output=Path("-".join([source.name, *_suffixes(made, registry)])))
    if _is_cut_out(made, source, registry):
        return Named(made, source)
    return Named(_with_export(made, registry, notice), source)


def _is_cut_out(options: AnyRun, source: Source, registry: Registry) -> bool:
    """True if a run writes a file of the kind of its model, without some experts or blocks.

    Such a file has the stored bytes of its model. All other files are exported.
    """
    if not isinstance(options, ShrinkRun) or not source.has_kind_of(options.directory):
        return False
    if options.explicit:
        return options.sizes.keys() <= {"experts"}
    named = options.method and registry.shrink_methods.get(options.method).chooses
    return options.mode == "depth" or (options.mode in (None, "width") and named == "experts")


def _with_export(options: W, registry: Registry, notice: Callable[[str], None]) -> W:
    """The options with a directory and a file to export, if the output is named like the file.

    Raises:
        AptError: no export writes a file of such a name.
    """
    made: Any = options
    suffixes = {spec.suffix for spec in registry.exports.specs.values()}
    if made.export is None and made.output.suffix in suffixes:
        made = replace(made, output=made.output.with_suffix(""), export=made.output)
        notice(f"output: {made.output}, and exported {made.export}")
    elif made.export is not None:
        check_directory_name(made.output, registry)
    if made.export is not None:
        check_export(ExportRun(model=made.model, output=made.export), registry, ("export",))
    return made  # type: ignore[no-any-return]


def _check_packages(options: PruneRun | ShrinkRun | RecoverRun) -> None:
    """Raise if a package for the training of a run is not installed."""
    timed = isinstance(options, PruneRun) and options.minutes is not None
    if not (timed or isinstance(options, RecoverRun)):
        return
    if missing := [name for name in ("accelerate", "peft") if find_spec(name) is None]:
        fault = f"a training needs {' and '.join(missing)}"
        raise AptError(fault, "pip install 'apt-prune[recover]'")


def _plugin(options: PruneRun | ShrinkRun | RecoverRun, registry: Registry) -> dict[str, str]:
    """The name of the method or the kind, as its plugin declares it; empty if none is given."""
    if isinstance(options, RecoverRun):
        kind = options.kind
        return {} if kind is None else {"kind": registry.recoveries.get(kind).name}
    known = registry.methods if isinstance(options, PruneRun) else registry.shrink_methods
    return {} if options.method is None else {"method": known.get(options.method).name}


def _embedded(options: ModelRun, registry: Registry) -> str:
    """The embedded model of the adapter."""
    if options.adapter is None:
        raise AptError(
            "no MODEL is given", "name one, or an adapter for its embedded model", ("adapter",)
        )
    return f"zoo:{registry.adapters.get(options.adapter).name}"


def _metrics(options: MeasuringOptions, registry: Registry) -> tuple[str, ...]:
    """The names of the metrics, none of which needs a dense model."""
    specs = [registry.evaluators.get(name) for name in options.metrics]
    for spec in specs:
        if spec.dense:
            raise AptError(
                f"the metric {spec.name} compares with the dense model",
                "measure it afterwards with apt-prune eval, which takes the dense model",
            )
    return tuple(spec.name for spec in specs)


def _allocation(options: PruneRun, registry: Registry) -> str | None:
    """The name of the allocation: the given one, or the one that the unit implies, or None.

    Raises:
        AptError: it is unknown, or contradicts the unit.
    """
    name = options.allocation
    if options.per in PER_ALLOCATION:
        if name is not None:
            raise AptError(
                f"per {options.per} and allocation {name} exclude each other",
                "choose one",
                ("per", "allocation"),
            )
        name = PER_ALLOCATION[options.per]
    return None if name is None else registry.allocations.get(name).name


def _suffixes(options: PruneRun | ShrinkRun | RecoverRun, registry: Registry) -> list[str]:
    """The parts of the name of a directory that depend on the options."""
    if isinstance(options, PruneRun):
        pattern = str(pattern_of(options))
        plain = re.sub("(?<=[a-z]):", "", pattern).replace(":", "of").replace("@", "-")
        return [plain, options.method or registry.default_method().name]
    return ["recovered"] if isinstance(options, RecoverRun) else options.suffixes()


def pattern_of(options: PatternOptions) -> "Pattern | None":
    """The pattern of the options; None if none is given.

    Raises:
        AptError: it is not a pattern.
    """
    from apt.planning.plan import read_pattern

    per = getattr(options, "per", None)
    if options.sparsity is None:
        return None if options.pattern is None else read_pattern(options.pattern)
    if options.shared:
        return read_pattern(f"{options.pattern}@{options.sparsity}")
    pattern = read_pattern(options.sparsity)
    if not pattern.allocatable:
        raise AptError(f"sparsity {options.sparsity} is a pattern", "give it so", ("pattern",))
    return pattern.counted(per) if per in ("row", "layer") else pattern


def selection_of(options: PatternOptions) -> "Selection":
    """The sites that the options select, and the overrides with their patterns.

    Raises:
        AptError: an override has no pattern.
    """
    from apt.planning.plan import Selection, read_pattern

    pairs = (text.rpartition("=") for text in options.overrides)
    overrides = tuple((glob, read_pattern(pattern)) for glob, _, pattern in pairs)
    return Selection(options.only, options.skip, overrides)
