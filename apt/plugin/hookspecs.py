"""The hooks of plugins. The built-in plugins use the same hooks.

Example:

    from apt.plugin.hookspecs import hookimpl
    from apt.plugin.specs import AdapterSpec

    @hookimpl
    def apt_adapters():
        return [AdapterSpec("mine", "My family", "my_package:MyAdapter", model_types=("mine",))]
"""

from collections.abc import Iterable

import pluggy

from apt.events import SitePruned
from apt.plugin.specs import (
    AdapterSpec,
    AllocationSpec,
    CalibrationSpec,
    CommandSpec,
    EvaluatorSpec,
    ExportSpec,
    FormatSpec,
    MethodSpec,
    PatternSpec,
    QuantisedFormatSpec,
    RecoverySpec,
    ShrinkMethodSpec,
)

PROJECT = "apt"

API = 1
"""The version of the hooks. A plugin module with ``APT_API = 1`` is loaded by every APT that
supports version 1. A module without ``APT_API`` is loaded by every APT."""

OLDEST_API = 1
"""The oldest supported version. A hook or a field that will be removed stays, with a warning, for
two minor releases of APT. Then ``API`` rises, and ``OLDEST_API`` one minor release later."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def apt_adapters() -> Iterable[AdapterSpec]:  # type: ignore[empty-body]
    """The adapters of this plugin, one for each model family."""


@hookspec
def apt_formats() -> Iterable[FormatSpec]:  # type: ignore[empty-body]
    """The checkpoint formats that this plugin reads, beside the one of transformers."""


@hookspec
def apt_quantised_formats() -> Iterable[QuantisedFormatSpec]:  # type: ignore[empty-body]
    """The formats of quantised checkpoints from which this plugin removes experts and blocks."""


@hookspec
def apt_exports() -> Iterable[ExportSpec]:  # type: ignore[empty-body]
    """The file formats of other software that this plugin writes."""


@hookspec
def apt_methods() -> Iterable[MethodSpec]:  # type: ignore[empty-body]
    """The pruning methods of this plugin."""


@hookspec
def apt_patterns() -> Iterable[PatternSpec]:  # type: ignore[empty-body]
    """The kinds of patterns of this plugin."""


@hookspec
def apt_shrink_methods() -> Iterable[ShrinkMethodSpec]:  # type: ignore[empty-body]
    """The methods of this plugin that choose channels, heads or blocks to remove."""


@hookspec
def apt_allocations() -> Iterable[AllocationSpec]:  # type: ignore[empty-body]
    """The allocations of this plugin: ways to distribute a sparsity over the sites."""


@hookspec
def apt_recoveries() -> Iterable[RecoverySpec]:  # type: ignore[empty-body]
    """The kinds of recovery of this plugin."""


@hookspec
def apt_evaluators() -> Iterable[EvaluatorSpec]:  # type: ignore[empty-body]
    """The metrics of this plugin."""


@hookspec
def apt_calibrations() -> Iterable[CalibrationSpec]:  # type: ignore[empty-body]
    """The text sources of this plugin."""


@hookspec
def apt_commands() -> Iterable[CommandSpec]:  # type: ignore[empty-body]
    """The subcommands of this plugin. A name of one of APT's own commands is an error."""


@hookspec
def apt_site_pruned(event: SitePruned) -> None:
    """Called after each pruned site, from the thread that prunes.

    If several processes prune together, only the first one calls it, for all sites. If an observer
    raises an exception, a warning reports it and the observer is not called again.
    """
