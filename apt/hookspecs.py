"""The plugin surface. A plugin is a module named by an entry point of group ``apt``.

Built-ins come through the same door. Example::

    from apt.hookspecs import hookimpl
    from apt.specs import AdapterSpec

    @hookimpl
    def apt_adapters():
        return [AdapterSpec("mine", "My family", "my_package:MyAdapter", model_types=("mine",))]
"""

from collections.abc import Iterable

import pluggy

from apt.specs import AdapterSpec, CalibrationSpec, MethodSpec

PROJECT = "apt"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def apt_adapters() -> Iterable[AdapterSpec]:  # type: ignore[empty-body]
    """The model families that this plugin serves."""


@hookspec
def apt_methods() -> Iterable[MethodSpec]:  # type: ignore[empty-body]
    """The pruning methods that this plugin offers."""


@hookspec
def apt_calibrations() -> Iterable[CalibrationSpec]:  # type: ignore[empty-body]
    """The text sources that this plugin offers."""
