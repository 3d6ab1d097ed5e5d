"""Names of a package that are imported on their first use (PEP 562): most of them need torch."""

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, names_of: Mapping[str, Iterable[str]]) -> Callable[[str], Any]:
    """The function ``__getattr__`` of a package that imports its public names on their first use.

    Args:
        names_of: the names that each module has.
    """
    module_of = {name: module for module, names in names_of.items() for name in names}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(import_module(module_of[name]), name)

    return get
