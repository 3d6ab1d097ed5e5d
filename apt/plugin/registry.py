"""Loading of plugins, and lookup of their specs by name."""

import os
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import pluggy

from apt.errors import AptError, first_line, unknown_name
from apt.plugin import hookspecs
from apt.plugin.commands import OWN
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
    Spec,
)

S = TypeVar("S", bound=Spec)

OWN_DISTRIBUTION = "apt-prune"

DISABLE = "APT_DISABLE_PLUGINS"
"""The environment variable with the distributions or entry points to leave out, separated by commas
or blanks. ``*`` leaves out all except APT's own."""


@dataclass(frozen=True)
class Plugin:
    """An entry point, and the result of loading it.

    Attributes:
        distribution: the distribution that declares it, with its version.
        name, module: the entry point.
        problem: the error on loading the plugin or a part of it; empty without an error.
        disabled: True if `DISABLE` names the plugin.
    """

    distribution: str
    name: str
    module: str
    problem: str = ""
    disabled: bool = False

    @property
    def distribution_name(self) -> str:
        """The name of the distribution, without its version."""
        return self.distribution.partition(" ")[0]

    @property
    def key(self) -> str:
        """The key of the plugin in the registry."""
        return f"{self.distribution}:{self.name}"


_CORE = Plugin(OWN_DISTRIBUTION, "", "apt")  # has no entry point


@dataclass(frozen=True)
class Catalog(Generic[S]):
    """All specs of one kind by name, with the plugin of each spec, and all plugins."""

    kind: str
    specs: Mapping[str, S]
    origins: Mapping[str, Plugin]
    plugins: Mapping[str, Plugin]

    def get(self, name: str) -> S:
        """The spec of a name in any case; the `AptError` for an unknown name suggests another."""
        by_case = {spec_name.lower(): spec for spec_name, spec in self.specs.items()}
        if name.lower() not in by_case:
            raise unknown_name(self.kind, name, self.specs, _unavailable(self.plugins.values()))
        return by_case[name.lower()]

    def is_own(self, spec: S) -> bool:
        """True if a spec is one of APT's own."""
        return self.origins[spec.name].distribution_name == OWN_DISTRIBUTION


@dataclass(frozen=True)
class Registry:
    """The specs and observers of all plugins."""

    adapters: Catalog[AdapterSpec]
    formats: Catalog[FormatSpec]
    quantised_formats: Catalog[QuantisedFormatSpec]
    exports: Catalog[ExportSpec]
    methods: Catalog[MethodSpec]
    patterns: Catalog[PatternSpec]
    shrink_methods: Catalog[ShrinkMethodSpec]
    allocations: Catalog[AllocationSpec]
    recoveries: Catalog[RecoverySpec]
    calibrations: Catalog[CalibrationSpec]
    evaluators: Catalog[EvaluatorSpec]
    commands: Catalog[CommandSpec]
    plugins: Mapping[str, Plugin]
    observers: dict[str, pluggy.HookImpl]

    def offers(self, plugin: Plugin) -> list[str]:
        """The names of the specs of ``plugin``, and ``an observer`` if it has one."""
        catalogs = [entry for entry in vars(self).values() if isinstance(entry, Catalog)]
        names = [
            name
            for catalog in catalogs
            for name, origin in catalog.origins.items()
            if origin.key == plugin.key
        ]
        return names + ["an observer"] * (plugin.key in self.observers)

    def site_pruned(self, event: Any) -> None:
        """Call every observer. One that raises causes a warning, and is not called again."""
        for name, observer in list(self.observers.items()):
            try:
                observer.function(*[event for _ in observer.argnames])
            except Exception as error:
                del self.observers[name]
                problem = f"{name}: {type(error).__name__}: {first_line(error)}"
                warnings.warn(f"observer failed and is left out: {problem}", stacklevel=2)

    def pattern_kinds(self) -> list[PatternSpec]:
        """The kinds of patterns, those of APT first."""
        return sorted(self.patterns.specs.values(), key=lambda spec: not self.patterns.is_own(spec))

    def default_method(self) -> MethodSpec:
        """The most accurate of APT's own methods, or of all methods if those are disabled.

        A method of another package is used only by name, whatever its rank.
        """
        return _most_accurate(self.methods, self.methods.specs.values())

    def default_shrink_method(
        self, kind: Literal["groups", "experts", "blocks"], *, streams: bool = False
    ) -> ShrinkMethodSpec:
        """The most accurate of APT's own choices of blocks, of experts, or of other groups.

        Args:
            kind: what it chooses.
            streams: True if the blocks stay on disk.
        """
        choices = {"blocks": ("blocks",), "experts": ("experts",), "groups": ("columns", "groups")}
        specs = self.shrink_methods.specs.values()
        candidates = [s for s in specs if s.chooses in choices[kind] and s.streams >= streams]
        return _most_accurate(self.shrink_methods, candidates)

    def adapter_for(self, model_type: str) -> AdapterSpec:
        """The only adapter that claims ``model_type``; without one, the default adapter.

        Raises:
            AptError: several adapters claim the type; or none does, and there is no default.
        """
        specs = self.adapters.specs.values()
        matching = [spec for spec in specs if model_type in spec.model_types]
        matching = matching or [spec for spec in specs if spec.default]
        if len(matching) == 1:
            return matching[0]
        if not matching:
            supported = ", ".join(sorted(kind for spec in specs for kind in spec.model_types))
            raise AptError(
                f"no adapter serves models of type '{model_type}'",
                f"install a package with one; supported: {supported}",
                ("adapter",),
            )
        names = " and ".join(f"'{spec.name}'" for spec in matching)
        raise AptError(f"adapters {names} all serve '{model_type}'", "choose one", ("adapter",))


R = TypeVar("R", bound=MethodSpec)


def _most_accurate(catalog: Catalog[R], specs: Iterable[R]) -> R:
    """The spec of APT with the highest rank; without specs of APT, the one of all specs."""
    candidates = list(specs)
    if not candidates:
        message = f"no {catalog.kind} is installed{_unavailable(catalog.plugins.values())}"
        raise AptError(message, "install a package with one, or leave out APT_DISABLE_PLUGINS")
    apt_specs = [spec for spec in candidates if catalog.is_own(spec)]
    return max(apt_specs or candidates, key=lambda spec: spec.rank)


class _Loader:
    def __init__(self, disable: str) -> None:
        self.manager = pluggy.PluginManager(hookspecs.PROJECT)
        self.manager.add_hookspecs(hookspecs)
        self.plugins: dict[str, Plugin] = {}
        self._disable = {word.lower() for word in disable.replace(",", " ").split()}

    def load(self, entry: EntryPoint) -> None:
        """Register one entry point. A failure is a warning that names the distribution."""
        origin = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
        plugin = Plugin(origin, entry.name, entry.value)
        self.plugins[plugin.key] = plugin
        if self._disabled(entry):
            self.plugins[plugin.key] = replace(plugin, disabled=True)
            return
        try:
            module = entry.load()
            _check_version(getattr(module, "APT_API", hookspecs.API))
            self.manager.register(module, name=plugin.key)
            _check_wrappers(self.manager.get_hookcallers(module) or [], plugin.key)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # of any kind: one plugin must not end the program
            self.manager.unregister(name=plugin.key)
            self.note(plugin.key, error)

    def _disabled(self, entry: EntryPoint) -> bool:
        distribution = entry.dist.name if entry.dist else ""
        by_star = "*" in self._disable and distribution != OWN_DISTRIBUTION
        return by_star or not self._disable.isdisjoint({distribution.lower(), entry.name.lower()})

    def note(self, key: str, error: BaseException) -> None:
        problem = f"{type(error).__name__}: {first_line(error)}"
        self.plugins[key] = replace(self.plugins[key], problem=problem)
        warnings.warn(
            f"plugin failed to load: {self.plugins[key].distribution}: {problem}", stacklevel=2
        )

    def unknown_hook(self, error: pluggy.PluginValidationError) -> str:
        """The line for a hook that does not exist, with the distribution that implements it."""
        key = self.manager.get_name(error.plugin) or ""
        message = first_line(error).partition(" in plugin ")[0]
        return f"plugin {self.plugins[key].distribution}: {message}"

    def catalog(
        self, kind: str, hook: pluggy.HookCaller, spec_type: type[S], core_specs: Iterable[S] = ()
    ) -> Catalog[S]:
        """Call ``hook`` on every plugin and collect the specs. A duplicate name is an error.

        Names that differ in upper and lower case only are duplicates, as `Catalog.get` ignores it.
        ``core_specs`` are APT's own specs that do not come from a plugin.
        """
        specs: dict[str, S] = {spec.name: spec for spec in core_specs}
        origins = dict.fromkeys(specs, _CORE)
        names = {name.lower(): name for name in specs}
        for implementation in hook.get_hookimpls():
            origin = self.plugins[implementation.plugin_name]
            for spec in self._call(implementation, spec_type):
                first_name = names.setdefault(spec.name.lower(), spec.name)
                if first_name in specs:
                    pair = (origins[first_name], origin)
                    distributions = " and ".join(sorted({plugin.distribution for plugin in pair}))
                    raise AptError(
                        f"{kind} '{spec.name}' comes from {distributions}", "uninstall one"
                    )
                specs[spec.name], origins[spec.name] = spec, origin
        return Catalog(kind, specs, origins, self.plugins)

    def _call(self, implementation: pluggy.HookImpl, spec_type: type[S]) -> list[S]:
        try:
            declared: Iterable[S] = implementation.function()  # type: ignore[assignment]
            specs = list(declared)
            if invalid := [spec for spec in specs if not isinstance(spec, spec_type)]:
                raise TypeError(f"{invalid[0]!r} is not of type {spec_type.__name__}")
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self.note(implementation.plugin_name, error)
            return []
        return specs


def _unavailable(plugins: Iterable[Plugin]) -> str:
    """The plugins that failed or are disabled, for the end of a message."""
    failed = [f"{p.distribution}: {p.problem}" for p in plugins if p.problem]
    disabled = [p.distribution for p in plugins if p.disabled]
    text = f" (plugins that failed to load: {'; '.join(failed)})" if failed else ""
    return text + (f" ({DISABLE} leaves out {', '.join(disabled)})" if disabled else "")


def _check_wrappers(callers: Iterable[pluggy.HookCaller], plugin: str) -> None:
    """Refuse a wrapper hook: APT calls the hook of every plugin separately."""
    for caller in callers:
        for implementation in caller.get_hookimpls():
            wraps = implementation.wrapper or implementation.hookwrapper
            if implementation.plugin_name == plugin and wraps:
                raise TypeError(f"{caller.name} cannot be a wrapper")


def _check_version(required: object) -> None:
    """Refuse a plugin for an unsupported version of the hooks."""
    if not isinstance(required, int):
        raise TypeError(f"APT_API is {required!r}, not a whole number")
    if required > hookspecs.API:
        raise RuntimeError(
            f"needs version {required} of the hooks, this APT has {hookspecs.API}: "
            f"upgrade {OWN_DISTRIBUTION}"
        )
    if required < hookspecs.OLDEST_API:
        raise RuntimeError(
            f"needs version {required} of the hooks, "
            f"this APT has {hookspecs.OLDEST_API} and later: "
            "upgrade the plugin"
        )


def load_registry(entries: Iterable[EntryPoint], disable: str = "") -> Registry:
    """Load the plugins of ``entries``, one by one.

    Args:
        entries: the entry points.
        disable: distributions or entry points to leave out, see `DISABLE`.

    Raises:
        AptError: two plugins claim one name, or a plugin implements a hook that does not exist.
    """
    loader = _Loader(disable)
    for entry in entries:
        loader.load(entry)
    try:
        loader.manager.check_pending()
    except pluggy.PluginValidationError as error:
        hint = f"correct the hook's name, or leave the plugin out with {DISABLE}"
        raise AptError(loader.unknown_hook(error), hint) from error
    hook = loader.manager.hook
    return Registry(
        loader.catalog("adapter", hook.apt_adapters, AdapterSpec),
        loader.catalog("format", hook.apt_formats, FormatSpec),
        loader.catalog("quantised format", hook.apt_quantised_formats, QuantisedFormatSpec),
        loader.catalog("export format", hook.apt_exports, ExportSpec),
        loader.catalog("method", hook.apt_methods, MethodSpec),
        loader.catalog("pattern", hook.apt_patterns, PatternSpec),
        loader.catalog("shrink method", hook.apt_shrink_methods, ShrinkMethodSpec),
        loader.catalog("allocation", hook.apt_allocations, AllocationSpec),
        loader.catalog("recovery", hook.apt_recoveries, RecoverySpec),
        loader.catalog("data set", hook.apt_calibrations, CalibrationSpec),
        loader.catalog("metric", hook.apt_evaluators, EvaluatorSpec),
        loader.catalog("command", hook.apt_commands, CommandSpec, OWN),
        loader.plugins,
        {impl.plugin_name: impl for impl in hook.apt_site_pruned.get_hookimpls()},
    )


def _may_have(entry: EntryPoint, hooks: Collection[str]) -> bool:
    """False if the source of a plugin's module defines hooks, but names none of ``hooks``."""
    try:
        module = find_spec(entry.module)
        source = "" if module is None else Path(str(module.origin)).read_text("utf-8")
    except Exception:  # of any kind: loading the module reports it
        return True
    imports = "import *" in source or "def apt_" not in source
    return imports or any(hook in source for hook in hooks)


def listed(*hooks: str) -> Registry:
    """The registry of the plugins that may implement some of the ``hooks``, for lists.

    Most plugins are families, which import torch. Plugins without the hooks are not loaded.
    """
    entries = (e for e in entry_points(group=hookspecs.PROJECT) if _may_have(e, hooks))
    return load_registry(entries, os.environ.get(DISABLE, ""))


def listed_commands() -> Catalog[CommandSpec]:
    """The commands of ``apt-prune --help``."""
    return listed("apt_commands").commands


@cache
def registry() -> Registry:
    """The registry of the installed packages. It is loaded once in a process."""
    return load_registry(entry_points(group=hookspecs.PROJECT), os.environ.get(DISABLE, ""))
