"""Loading plugins, and finding by name what they offer."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

import pluggy

from apt import hookspecs
from apt.errors import AptError, first_line, unknown
from apt.specs import AdapterSpec, CalibrationSpec, MethodSpec, Spec

S = TypeVar("S", bound=Spec)


@dataclass(frozen=True)
class Shelf(Generic[S]):
    """All specs of one kind, by name, with the distribution that each comes from."""

    kind: str
    specs: Mapping[str, S]
    origins: Mapping[str, str]
    broken: tuple[str, ...]

    def get(self, name: str) -> S:
        """The spec of that name, in any case; an `AptError` suggests the closest otherwise."""
        by_case = {known.lower(): spec for known, spec in self.specs.items()}
        if name.lower() not in by_case:
            failed = f" (plugins that failed to load: {'; '.join(self.broken)})"
            raise unknown(self.kind, name, self.specs, failed if self.broken else "")
        return by_case[name.lower()]


@dataclass(frozen=True)
class Registry:
    """What all plugins offer."""

    adapters: Shelf[AdapterSpec]
    methods: Shelf[MethodSpec]
    calibrations: Shelf[CalibrationSpec]

    def default_method(self) -> MethodSpec:
        """The most accurate method there is."""
        return max(self.methods.specs.values(), key=lambda spec: spec.rank)

    def adapter_for(self, model_type: str) -> AdapterSpec:
        """The only adapter that claims ``model_type``."""
        claims = [s for s in self.adapters.specs.values() if model_type in s.model_types]
        if len(claims) == 1:
            return claims[0]
        if not claims:
            served = sorted(t for s in self.adapters.specs.values() for t in s.model_types)
            raise AptError(
                f"no adapter serves models of type '{model_type}'",
                f"install a package with one, or try --adapter; served: {', '.join(served)}",
            )
        names = " and ".join(f"'{spec.name}'" for spec in claims)
        raise AptError(f"adapters {names} all serve '{model_type}'", "choose one with --adapter")


@dataclass
class _Loader:
    manager: pluggy.PluginManager
    origins: dict[str, str] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def load(self, entry: EntryPoint) -> None:
        """Register one entry point; a broken one is a warning that names its distribution."""
        origin = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
        name = f"{origin}:{entry.name}"
        try:
            self.manager.register(entry.load(), name=name)
        except Exception as error:
            self.note(origin, error)
        self.origins[name] = origin

    def note(self, origin: str, error: Exception) -> None:
        problem = f"{origin}: {type(error).__name__}: {first_line(error)}"
        self.broken.append(problem)
        warnings.warn(f"plugin failed to load: {problem}", stacklevel=2)

    def shelf(self, kind: str, hook: pluggy.HookCaller, of: type[S]) -> Shelf[S]:
        """Call ``hook`` on every plugin and collect the specs; a name claimed twice is an error."""
        specs: dict[str, S] = {}
        origins: dict[str, str] = {}
        for implementation in hook.get_hookimpls():
            origin = self.origins[implementation.plugin_name]
            for spec in self._call(implementation, origin, of):
                if spec.name in specs:
                    both = " and ".join(sorted({origins[spec.name], origin}))
                    raise AptError(f"{kind} '{spec.name}' comes from {both}", "uninstall one")
                specs[spec.name], origins[spec.name] = spec, origin
        return Shelf(kind, specs, origins, tuple(self.broken))

    def _call(self, implementation: pluggy.HookImpl, origin: str, of: type[S]) -> list[S]:
        try:
            declared: Iterable[S] = implementation.function()  # type: ignore[assignment]
            found = list(declared)
            if wrong := [spec for spec in found if not isinstance(spec, of)]:
                raise TypeError(f"{wrong[0]!r} is no {of.__name__}")
        except Exception as error:
            self.note(origin, error)
            return []
        return found


def load_registry(entries: Iterable[EntryPoint]) -> Registry:
    """Load the plugins of ``entries``, one by one.

    Raises:
        AptError: two plugins claim one name, or a plugin implements a hook that does not exist.
    """
    loader = _Loader(pluggy.PluginManager(hookspecs.PROJECT))
    loader.manager.add_hookspecs(hookspecs)
    for entry in entries:
        loader.load(entry)
    try:
        loader.manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise AptError(first_line(error), "correct the hook's name") from error
    hook = loader.manager.hook
    return Registry(
        loader.shelf("adapter", hook.apt_adapters, AdapterSpec),
        loader.shelf("method", hook.apt_methods, MethodSpec),
        loader.shelf("data set", hook.apt_calibrations, CalibrationSpec),
    )


@cache
def registry() -> Registry:
    """What the installed packages offer; read once in a process."""
    return load_registry(entry_points(group=hookspecs.PROJECT))
