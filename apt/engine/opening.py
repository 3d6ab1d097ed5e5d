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
    DEFAULT_PATTERN,
    ExportRun,
    FitRun,
    MeasuringOptions,
    ModelRun,
    PatternOptions,
    PruneRun,
    ReapplyRun,
    RecoverRun,
    RemoteOptions,
    ShrinkRun,
)
from apt.options.fit import DIRECTORIES, PACKED
from apt.plugin.registry import Registry
from apt.plugin.specs import ExportSpec

if TYPE_CHECKING:
    from apt.patterns import Pattern
    from apt.planning.plan import Selection

AnyRun = PruneRun | ShrinkRun | FitRun | RecoverRun | ReapplyRun
R = TypeVar("R", bound=AnyRun)
W = TypeVar("W", bound=PruneRun | ShrinkRun | RecoverRun)

_DEFAULT_FORMAT = "gguf"  # of a fit without an output
PER_ALLOCATION = {"block": "auto-block", "model": "auto"}
"""The allocation for each unit of a sparsity that several sites share."""


@dataclass(frozen=True)
class RunRequest(Generic[R]):
    """The options of a run with resolved names, and the location of its model."""

    options: R
    source: Source


def find_source(reference: str, options: RemoteOptions, registry: Registry) -> Source:
    """The location of a model. For a model on the hub, the hub is contacted.

    Raises:
        AptError: there is no such model.
    """
    trust, hub = options.trust_remote_code, Hub(options.revision)
    return find(reference, registry, trust_remote_code=trust, hub=hub)


def cuts_file(options: Any, source: Source) -> bool:
    """True if the output of a run has the stored bytes of the file of its model."""
    return source.has_kind_of(options.output) and not getattr(options, "exports_alone", False)


def check_export(
    run: ExportRun, registry: Registry, options: tuple[str, ...] = ("format",)
) -> ExportSpec:
    """The format of an export: the given format, or the format of the suffix of the output.

    ``options`` are the options that choose the format, for the message.

    Raises:
        AptError: there is no such format, or it needs a package that is not installed; or the
            output has another suffix, or the type does not exist.
    """
    catalog = registry.exports
    if run.format is not None:
        spec = catalog.get(run.format)
    else:
        exports = list(catalog.specs.values())
        matching = [export for export in exports if run.output.suffix == export.suffix]
        if len(matching) != 1:
            kinds = ", ".join(f"{export.name} ({export.suffix})" for export in exports)
            message = f"the suffix of {run.output} does not say the format"
            raise AptError(message, f"choose one: {kinds or 'none is installed'}", options)
        spec = matching[0]
    if run.output.suffix != spec.suffix:
        message = f"the output {run.output} is not a {spec.suffix} file"
        raise AptError(message, "choose another name", ("output",))
    if run.type is not None and run.type.lower() not in map(str.lower, spec.types):
        types = ", ".join(spec.types) or "none to choose from"
        raise AptError(f"{spec.name} has no type '{run.type}'", f"it writes {types}", ("type",))
    for module in spec.requires:
        if find_spec(module) is None:
            raise AptError(f"{spec.name} files need the package {module}", spec.install)
    return spec


def check_directory_name(output: Path, registry: Registry) -> None:
    """Raise if a directory has the suffix of the files of an export."""
    for spec in registry.exports.specs.values():
        if output.suffix == spec.suffix:
            raise AptError(
                f"the output {output} is a directory, in the format of transformers",
                f"name it {output.stem}, and then: apt-prune export {output.stem} -o {output}",
                ("output",),
            )


def resolve_names(options: R, registry: Registry, notice: Callable[[str], None]) -> RunRequest[R]:
    """The options with all names filled in, and the location of the model.

    ``notice`` is called with a line about each default.

    Raises:
        AptError: a name is unknown, or the model is not found.
    """
    if isinstance(options, ReapplyRun):
        return RunRequest(options, find_source(options.model, options, registry))
    resolved: Any = options
    if isinstance(options, FitRun):
        return _resolve_fit(resolved, registry, notice)  # type: ignore[return-value]

    def choose(**values: Any) -> None:
        nonlocal resolved
        for name, value in values.items():
            notice(f"{name}: {value} (default)")
        resolved = replace(resolved, **values)

    _check_packages(resolved)
    if isinstance(options, ModelRun) and not options.model:
        choose(model=_embedded_model(options, registry))
    resolved = replace(
        resolved, metrics=_metrics(resolved, registry), **_plugin_name(resolved, registry)
    )
    source = find_source(resolved.model, options, registry)
    if isinstance(options, PruneRun):
        if pattern_of(options) is None:
            choose(pattern=DEFAULT_PATTERN)
        resolved = replace(resolved, allocation=_allocation(resolved, registry))
    has_scores = isinstance(options, ShrinkRun) and options.scores_from is not None
    if resolved.calibration == MeasuringOptions.calibration and not has_scores:
        notice(f"calibration: {resolved.calibration} (default)")
    if resolved.output is None:
        choose(output=Path("-".join([source.name, *_suffixes(resolved, registry)])))
    if _is_cut_out(resolved, source, registry):
        return RunRequest(resolved, source)
    return RunRequest(_with_export(resolved, registry), source)


def _resolve_fit(
    options: FitRun, registry: Registry, notice: Callable[[str], None]
) -> RunRequest[FitRun]:
    """`resolve_names` for a run that fits a model into a budget."""
    _check_packages(options)
    source = find_source(options.model, options, registry)
    if options.calibration == MeasuringOptions.calibration:
        notice(f"calibration: {options.calibration} (default)")
    output, target = options.output, _fit_target(options, registry)
    if output is None:
        suffix = "" if target in DIRECTORIES else registry.exports.get(target).suffix
        output = Path(f"{source.name}-fit{suffix}")
        notice(f"output: {output} (default)")
    metrics = _metrics(options, registry)
    options = replace(options, metrics=metrics, output=output, target=target)
    options.check_target()
    return RunRequest(options, source)


def _fit_target(options: FitRun, registry: Registry) -> str:
    """The kind of output of a fit: packed, vllm, or the name of an export format.

    Raises:
        AptError: there is no such format, or the output has the name of a file.
    """
    specs = registry.exports.specs.values()
    named = [spec.name for spec in specs if options.output and spec.suffix == options.output.suffix]
    if options.target not in (None, *DIRECTORIES):
        return registry.exports.get(options.target).name
    if options.target is None and options.output is None:
        return PACKED if options.needs_packed else _DEFAULT_FORMAT
    if options.target is None:
        return next(iter(named), PACKED)
    if named:
        message = f"the output is a directory, and {options.output} is the name of a file"
        raise AptError(message, "choose another name", ("output", "target"))
    return options.target


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


def _with_export(options: W, registry: Registry) -> W:
    """The options with a file to export. It is the output, if that has the suffix of such a file.

    Raises:
        AptError: no export writes a file of such a name, or an option has no effect on it.
    """
    resolved: Any = options
    suffixes = {spec.suffix for spec in registry.exports.specs.values()}
    if resolved.export is None and resolved.output.suffix in suffixes:
        resolved = replace(resolved, export=resolved.output)
    alone, output = resolved.exports_alone, resolved.output
    if resolved.export is None:
        if resolved.export_type is not None:
            message = "export type has no effect without a file to export"
            raise AptError(message, "leave it out, or add export", ("export_type", "export"))
        return options
    if not alone:
        check_directory_name(output, registry)
    exporting = ExportRun(model=resolved.model, output=resolved.export, type=resolved.export_type)
    try:
        check_export(exporting, registry, ("output",) if alone else ("export",))
    except AptError as error:
        error.options = tuple("export_type" if name == "type" else name for name in error.options)
        raise
    for name in ("save_masks", "save_adapter", "max_shard_size"):
        if alone and getattr(resolved, name, None):
            message = f"{name.replace('_', ' ')} has no effect on {output}, which is one file"
            raise AptError(message, "name a directory, and export it", (name, "output", "export"))
    return resolved  # type: ignore[no-any-return]


def _check_packages(options: PruneRun | ShrinkRun | FitRun | RecoverRun) -> None:
    """Raise if a package for the training of a run is not installed."""
    is_timed = isinstance(options, PruneRun | FitRun) and options.minutes is not None
    if not (is_timed or isinstance(options, RecoverRun)):
        return
    if missing := [name for name in ("accelerate", "peft") if find_spec(name) is None]:
        message = f"a training needs {' and '.join(missing)}"
        raise AptError(message, "pip install 'apt-prune[recover]'")


def _plugin_name(options: PruneRun | ShrinkRun | RecoverRun, registry: Registry) -> dict[str, str]:
    """The option for the method or the kind, as its plugin names it; empty if it is not given."""
    if isinstance(options, RecoverRun):
        kind = options.kind
        return {} if kind is None else {"kind": registry.recoveries.get(kind).name}
    methods = registry.methods if isinstance(options, PruneRun) else registry.shrink_methods
    return {} if options.method is None else {"method": methods.get(options.method).name}


def _embedded_model(options: ModelRun, registry: Registry) -> str:
    """The embedded model of the adapter."""
    if options.adapter is None:
        raise AptError(
            "no MODEL is given", "name one, or an adapter for its embedded model", ("adapter",)
        )
    return f"zoo:{registry.adapters.get(options.adapter).name}"


def _metrics(options: MeasuringOptions, registry: Registry) -> tuple[str, ...]:
    """The names of the metrics. A metric that needs a dense model is an error."""
    specs = [registry.evaluators.get(name) for name in options.metrics]
    for spec in specs:
        if spec.dense and spec.reads == "windows":
            raise AptError(
                f"the metric {spec.name} compares with the dense model",
                "measure it afterwards with apt-prune eval, which takes the dense model",
            )
    return tuple(spec.name for spec in specs)


def _allocation(options: PruneRun, registry: Registry) -> str | None:
    """The name of the given allocation or of the unit's allocation, or None.

    Raises:
        AptError: the allocation is unknown, or contradicts the unit.
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
        name = re.sub("(?<=[a-z]):", "", pattern).replace(":", "of").replace("@", "-")
        return [name, options.method or registry.default_method().name]
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
