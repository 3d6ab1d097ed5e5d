"""The plugin surface. A plugin is a module named by an entry point of group ``apt``.

Built-ins come through the same door. Example::

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
    EvaluatorSpec,
    FormatSpec,
    MethodSpec,
)

PROJECT = "apt"

API = 1
"""The version of this surface. A plugin module that says ``APT_API = 1`` is loaded by every APT
that serves that version; one that says nothing takes what it gets."""

OLDEST_API = 1
"""The oldest version that is still served. A hook or a field that is to go is kept, with a warning,
for two minor releases of APT; then ``API`` rises, and one minor release later ``OLDEST_API``."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def apt_adapters() -> Iterable[AdapterSpec]:  # type: ignore[empty-body]
    """The model families that this plugin serves."""


@hookspec
def apt_formats() -> Iterable[FormatSpec]:  # type: ignore[empty-body]
    """The formats of checkpoints, beside that of transformers, that this plugin reads."""


@hookspec
def apt_methods() -> Iterable[MethodSpec]:  # type: ignore[empty-body]
    """The pruning methods that this plugin offers."""


@hookspec
def apt_allocations() -> Iterable[AllocationSpec]:  # type: ignore[empty-body]
    """The ways to share out a sparsity that this plugin offers."""


@hookspec
def apt_evaluators() -> Iterable[EvaluatorSpec]:  # type: ignore[empty-body]
    """The measures of a model that this plugin offers."""


@hookspec
def apt_calibrations() -> Iterable[CalibrationSpec]:  # type: ignore[empty-body]
    """The text sources that this plugin offers."""


@hookspec
def apt_site_pruned(event: SitePruned) -> None:
    """Called after every site that is pruned, from the thread that prunes.

    An observer that raises is told of in a warning and not called again.
    """
