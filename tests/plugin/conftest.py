"""Entry points of made-up distributions."""

import sys
from importlib.metadata import Distribution, EntryPoint
from types import ModuleType

import pytest

from apt.hookspecs import hookimpl


class Fake(Distribution):
    def __init__(self, name):
        self._name = name

    def read_text(self, filename):
        return f"Name: {self._name}\nVersion: 1.2\n" if filename == "METADATA" else None

    def locate_file(self, path):
        raise AssertionError


@pytest.fixture
def entry(monkeypatch):
    """Make an entry point of a distribution of that name, for a module with these hooks."""

    def make(distribution, error=None, **hooks):
        module = ModuleType(f"plugin_{distribution}")
        for name, function in hooks.items():
            function.__name__ = name
            setattr(module, name, hookimpl(function))
        if error is None:
            monkeypatch.setitem(sys.modules, module.__name__, module)
        point = EntryPoint("main", module.__name__, "apt")
        vars(point)["dist"] = Fake(distribution)
        return point

    return make
