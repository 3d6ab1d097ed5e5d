"""The names of modules in a configuration: those of a smaller model, with fewer blocks and experts.

Lists of modules that are not quantised name blocks and experts by their numbers, or by patterns.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from apt.errors import AptError

_SIGNS = re.compile(r"^(re:|[+-]:)")  # of patterns: compressed-tensors, gptqmodel


class Renaming:
    """The names of tensors and modules in the smaller model, by their names in the checkpoint.

    Args:
        pairs: the names of a tensor in the checkpoint and in the smaller model.
        known: the names of all tensors of the checkpoint.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]], known: Iterable[str]) -> None:
        self._new: dict[str, str] = {}
        for before, after in pairs:
            for module, renamed in zip(_paths(before), _paths(after), strict=False):
                self._new.setdefault(module, renamed)
        self._known = {path for name in known for path in _paths(name)} | self._new.keys()

    def new(self, module: str) -> str | None:
        """The name of a module in the smaller model; None if it is dropped or not known."""
        return self._new.get(module)

    def apply(self, value: Any) -> Any:
        """A part of a configuration, in which lists and keys have the new names.

        Dropped modules are left out.

        Raises:
            AptError: a pattern matches other modules in the smaller model.
        """
        if isinstance(value, dict):
            named = ((self._renamed(key), each) for key, each in value.items())
            return {key: self.apply(each) for key, each in named if key is not None}
        if isinstance(value, list):
            entries = (self._renamed(each) if isinstance(each, str) else each for each in value)
            kept = [each for each in entries if each is not None or None in value]
            return [each if isinstance(each, str) else self.apply(each) for each in kept]
        return value

    def _renamed(self, entry: Any) -> str | None:
        """The new name of an entry; None if its module is dropped."""
        if not isinstance(entry, str) or not any(letter.isdigit() for letter in entry):
            return entry  # type: ignore[no-any-return]
        for module, prefix, added in _readings(entry):
            if module in self._known:
                new = self._new.get(module)
                return None if new is None else f"{prefix}{new.removeprefix(added)}"
        self._check_pattern(entry)
        return entry

    def _check_pattern(self, entry: str) -> None:
        """Raise if an entry that names no module matches a module under one of its names alone."""
        pattern = _SIGNS.sub("", entry)
        try:
            match = re.compile(pattern).match
        except re.error:
            match = re.compile(re.escape(pattern)).search
        for before, after in self._new.items():
            same = bool(match(before)) == bool(match(after))
            if not same or (pattern in before) != (pattern in after):
                raise AptError(
                    f"config.json has the pattern {entry!r}, which matches {before} but not "
                    f"{after}, its name in the smaller model"
                    if match(before) or pattern in before
                    else f"config.json has the pattern {entry!r}, which matches {after}, the new "
                    f"name of {before}",
                    "list the modules by their names there",
                )


def _paths(name: str) -> Iterator[str]:
    """The names of the modules around a tensor, from the outermost one, and its own."""
    end = name.find(".")
    while end >= 0:
        yield name[:end]
        end = name.find(".", end + 1)
    yield name


def _readings(entry: str) -> Iterator[tuple[str, str, str]]:
    """The modules that an entry may mean: a module, the prefix it lacks there, and one it has."""
    yield entry, "", ""
    yield f"model.{entry}", "", "model."
    prefix, rest = "", entry
    for _ in range(3):
        first, dot, rest = rest.partition(".")
        if not dot:
            return
        prefix += f"{first}."
        yield rest, prefix, ""
        yield f"model.{rest}", prefix, "model."
