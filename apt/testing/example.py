"""The subject of the checks for an adapter given by name: its example, or another model."""

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from inspect import getsourcefile, getsourcelines
from pkgutil import resolve_name
from typing import Any

from torch import Tensor, nn

from apt.adapter.text_config import text_config
from apt.checkpoints.load import load, open_skeleton
from apt.conformance.checks import Subject
from apt.conformance.error_location import at, explained, place_of
from apt.errors import AptError
from apt.locations.model_source import find
from apt.plugin.registry import Plugin, Registry
from apt.plugin.specs import AdapterSpec
from apt.testing.suite import random_tokens


class NoSubject(AptError):
    """No check can run; the error has all the reasons."""

    def __init__(self, reasons: list[str]) -> None:
        self._reasons = list(dict.fromkeys(reasons))
        super().__init__("\n".join(self._reasons))

    @property
    def faults(self) -> list[str]:
        """Every reason."""
        return self._reasons


def subject(registry: Registry, adapter: str, model: str | None = None) -> Subject:
    """The subject of the checks for the adapter of that name.

    Args:
        model: a reference to a model; by default the adapter's example (`AdapterSpec.example`),
            else its embedded checkpoint.

    Raises:
        NoSubject: the adapter is unknown, or it or its example cannot be made.
        AptError: the model cannot be loaded, or the adapter does not fit it.
    """
    spec = _spec(registry, adapter)
    if model is None and spec.example is None and spec.zoo is None:
        raise NoSubject(
            [f"adapter '{spec.name}' declares no example; give a model, preferably a small one"]
        )
    origin = registry.adapters.origins[spec.name]
    faults: list[str] = []
    with _collected(faults):
        instance = _adapter(spec, origin)
    if model is None and spec.example is not None:
        with _collected(faults):
            module = _example(spec, origin)
        if faults:
            raise NoSubject(faults)
        return Subject(instance, module.eval(), _tokens(module), spec)
    if faults:
        raise NoSubject(faults)
    skeleton = open_skeleton(find(model or f"zoo:{spec.name}", registry), registry, spec.name)
    opened = load(skeleton, compute="auto")
    of_family = model is None or (spec.example is None and spec.zoo is None)
    model_subject = Subject(
        opened.adapter, opened.module, _tokens(opened.module), spec if of_family else None
    )
    if model is not None:
        model_subject.adapter.blocks(opened.module)  # raises if the adapter does not fit the model
    return model_subject


@contextmanager
def _collected(faults: list[str]) -> Iterator[None]:
    try:
        yield
    except NoSubject as error:
        faults += error.faults


def _spec(registry: Registry, adapter: str) -> AdapterSpec:
    """The spec of an adapter; the error for an unknown name lists plugins that did not load."""
    try:
        return registry.adapters.get(adapter)
    except AptError as error:
        failed_plugins = [plugin for plugin in registry.plugins.values() if plugin.problem]
        if not failed_plugins:
            raise NoSubject([str(error)]) from error
        lines = [
            f"plugin {plugin.distribution} does not load: {_load_error(plugin)}"
            for plugin in failed_plugins
        ]
        close = get_close_matches(adapter, registry.adapters.specs, n=1, cutoff=0.8)
        suggestion = f"; did you mean '{close[0]}'?" if close else ""
        raise NoSubject([f"no adapter '{adapter}'{suggestion}", *lines]) from error


def _load_error(plugin: Plugin) -> str:
    """The error that a plugin raises on import, with the line of its file."""
    try:
        resolve_name(plugin.module).apt_adapters()
    except (Exception, SystemExit) as error:
        return explained(error)
    return plugin.problem


def _adapter(spec: AdapterSpec, origin: Plugin) -> Any:
    adapter_class = _imported(spec, "target", spec.target, origin)
    try:
        return adapter_class()
    except Exception as error:
        raise NoSubject([f"adapter '{spec.name}': {explained(error, adapter_class)}"]) from error


def _example(spec: AdapterSpec, origin: Plugin) -> nn.Module:
    assert spec.example is not None
    function = _imported(spec, "example", spec.example, origin)
    try:
        module = function()
    except Exception as error:
        line = f"the example of adapter '{spec.name}' raises {explained(error, function)}"
        raise NoSubject([line]) from error
    if not isinstance(module, nn.Module):
        got = "None" if module is None else f"a {type(module).__name__}"
        line = f"the example of adapter '{spec.name}' returns {got}, not a model"
        raise NoSubject([line + place_of(function)])
    if not hasattr(text_config(getattr(module, "config", None)), "vocab_size"):
        line = f"the example of adapter '{spec.name}' has no config.vocab_size"
        raise NoSubject([line + place_of(function)])
    return module


def _imported(spec: AdapterSpec, field: str, target: str, origin: Plugin) -> Any:
    """The object that a field of a spec names."""
    try:
        return resolve_name(target)
    except Exception as error:
        message = explained(error)
        if isinstance(error, AttributeError) and isinstance(error.name, str):
            close = get_close_matches(error.name, dir(error.obj), n=1)
            message += f"; did you mean '{close[0]}'?" if close else ""
        name = f"{field} '{target}' of adapter '{spec.name}'"
        place = _place_of_text(origin, target)
        raise NoSubject([f"{name} cannot be imported: {message}{place}"]) from error


def _place_of_text(origin: Plugin, text: str) -> str:
    """The line of a plugin's module that contains ``text``; empty if there is none."""
    try:
        module = resolve_name(origin.module)
        lines, file = getsourcelines(module)[0], getsourcefile(module) or ""
    except Exception:
        return ""
    numbers = [number for number, line in enumerate(lines, 1) if text in line]
    return at(file, numbers[0]) if numbers else ""


def _tokens(module: Any) -> Tensor:
    return random_tokens(text_config(module.config).vocab_size)
