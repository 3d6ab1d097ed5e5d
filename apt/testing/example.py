"""A small model of an adapter's family, to check the adapter with."""

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from inspect import getsourcefile, getsourcelines
from pkgutil import resolve_name
from typing import Any

from torch import Tensor, nn

from apt.checkpoints.load import load, skeleton
from apt.conformance.checks import Subject
from apt.conformance.error_location import at, explained, place_of
from apt.errors import AptError
from apt.locations.model_source import find
from apt.plugin.registry import Plugin, Registry
from apt.plugin.specs import AdapterSpec
from apt.testing.suite import random_tokens


class NotBegun(AptError):
    """There is nothing that can be checked, for each of some reasons."""

    def __init__(self, reasons: list[str]) -> None:
        self._reasons = list(dict.fromkeys(reasons))
        super().__init__("\n".join(self._reasons))

    @property
    def faults(self) -> list[str]:
        """Every reason."""
        return self._reasons


def subject(registry: Registry, adapter: str, model: str | None = None) -> Subject:
    """What to check the adapter of that name with.

    Args:
        registry: the plugins.
        adapter: the adapter's name.
        model: a model reference; by default the adapter's own example (`AdapterSpec.example`), else
            its embedded checkpoint.

    Raises:
        NotBegun: the adapter is unknown, or it or its example cannot be made.
        AptError: the model cannot be loaded or is none for this adapter.
    """
    spec = _spec(registry, adapter)
    if model is None and spec.example is None and spec.zoo is None:
        raise NotBegun(
            [f"adapter '{spec.name}' declares no example; give a MODEL, small as it may be"]
        )
    origin = registry.adapters.origins[spec.name]
    faults: list[str] = []
    with _collected(faults):
        made = _adapter(spec, origin)
    if model is None and spec.example is not None:
        with _collected(faults):
            module = _example(spec, origin)
        if faults:
            raise NotBegun(faults)
        return Subject(made, module.eval(), _tokens(module), spec)
    if faults:
        raise NotBegun(faults)
    found = load(skeleton(find(model or f"zoo:{spec.name}", registry), registry, spec.name))
    of_family = model is None or (spec.example is None and spec.zoo is None)
    there = Subject(found.adapter, found.module, _tokens(found.module), spec if of_family else None)
    if model is not None:
        there.adapter.blocks(found.module)  # whether the model is one for this adapter
    return there


@contextmanager
def _collected(faults: list[str]) -> Iterator[None]:
    try:
        yield
    except NotBegun as error:
        faults += error.faults


def _spec(registry: Registry, adapter: str) -> AdapterSpec:
    """The spec of that name; where there is none, what keeps plugins from loading."""
    try:
        return registry.adapters.get(adapter)
    except AptError as error:
        failed = [plugin for plugin in registry.plugins.values() if plugin.problem]
        if not failed:
            raise NotBegun([str(error)]) from error
        lines = [f"plugin {plugin.distribution} does not load: {_why(plugin)}" for plugin in failed]
        close = get_close_matches(adapter, registry.adapters.specs, n=1, cutoff=0.8)
        meant = f"; did you mean '{close[0]}'?" if close else ""
        raise NotBegun([f"no adapter '{adapter}'{meant}", *lines]) from error


def _why(plugin: Plugin) -> str:
    """What a plugin raises when it is loaded, with the line of its own file."""
    try:
        resolve_name(plugin.module).apt_adapters()
    except Exception as error:
        return explained(error)
    return plugin.problem


def _adapter(spec: AdapterSpec, origin: Plugin) -> Any:
    kind = _imported(spec, "target", spec.target, origin)
    try:
        return kind()
    except Exception as error:
        raise NotBegun([f"adapter '{spec.name}': {explained(error, kind)}"]) from error


def _example(spec: AdapterSpec, origin: Plugin) -> nn.Module:
    assert spec.example is not None
    function = _imported(spec, "example", spec.example, origin)
    try:
        module = function()
    except Exception as error:
        line = f"the example of adapter '{spec.name}' raises {explained(error, function)}"
        raise NotBegun([line]) from error
    if not isinstance(module, nn.Module):
        got = "None" if module is None else f"a {type(module).__name__}"
        line = f"the example of adapter '{spec.name}' returns {got}, not a model"
        raise NotBegun([line + place_of(function)])
    if not hasattr(getattr(module, "config", None), "vocab_size"):
        line = f"the example of adapter '{spec.name}' has no config.vocab_size"
        raise NotBegun([line + place_of(function)])
    return module


def _imported(spec: AdapterSpec, field: str, target: str, origin: Plugin) -> Any:
    """What a field of a spec names."""
    try:
        return resolve_name(target)
    except Exception as error:
        said = explained(error)
        if isinstance(error, AttributeError) and isinstance(error.name, str):
            close = get_close_matches(error.name, dir(error.obj), n=1)
            said += f"; did you mean '{close[0]}'?" if close else ""
        what = f"{field} '{target}' of adapter '{spec.name}' cannot be imported"
        raise NotBegun([f"{what}: {said}{_written(origin, target)}"]) from error


def _written(origin: Plugin, text: str) -> str:
    """Where a plugin's module has a text, if it has."""
    try:
        module = resolve_name(origin.module)
        lines, file = getsourcelines(module)[0], getsourcefile(module) or ""
    except Exception:
        return ""
    numbers = [number for number, line in enumerate(lines, 1) if text in line]
    return at(file, numbers[0]) if numbers else ""


def _tokens(module: Any) -> Tensor:
    return random_tokens(module.config.vocab_size)
