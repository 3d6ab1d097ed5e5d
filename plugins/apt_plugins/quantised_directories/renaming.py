"""New names of modules in the configuration of a model with fewer blocks and experts.

A configuration lists the modules that are not quantised, by names with the numbers of blocks and
experts, or by patterns.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from apt.errors import AptError

_PATTERN_PREFIXES = re.compile(r"^(re:|[+-]:)")  # of compressed-tensors, and of gptqmodel


class Renaming:
    """The names of tensors and modules in the smaller model, by their names in the checkpoint.

    Args:
        pairs: the names of a tensor in the checkpoint and in the smaller model.
        names: the names of all tensors of the checkpoint.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]], names: Iterable[str]) -> None:
        self._new: dict[str, str] = {}
        for before, after in pairs:
            for module, renamed in zip(_paths(before), _paths(after), strict=False):
                self._new.setdefault(module, renamed)
        self._known_paths = {path for name in names for path in _paths(name)} | self._new.keys()

    def new(self, module: str) -> str | None:
        """The name of a module in the smaller model; None if it is dropped or not known."""
        return self._new.get(module)

    def apply(self, value: Any) -> Any:
        """A part of a configuration with the new names of modules in its lists and keys.

        Dropped modules are left out.

        Raises:
            AptError: a pattern matches other modules in the smaller model.
        """
        if isinstance(value, dict):
            renamed = ((self._renamed(key), item) for key, item in value.items())
            return {key: self.apply(item) for key, item in renamed if key is not None}
        if isinstance(value, list):
            entries = (self._renamed(item) if isinstance(item, str) else item for item in value)
            kept = [item for item in entries if item is not None or None in value]
            return [item if isinstance(item, str) else self.apply(item) for item in kept]
        return value

    def _renamed(self, entry: Any) -> str | None:
        """The new name of an entry; None if its module is dropped."""
        if not isinstance(entry, str) or not any(letter.isdigit() for letter in entry):
            return entry  # type: ignore[no-any-return]
        for module, removed_prefix, added_prefix in _readings(entry):
            if module in self._known_paths:
                new = self._new.get(module)
                return None if new is None else f"{removed_prefix}{new.removeprefix(added_prefix)}"
        self._check_pattern(entry)
        return entry

    def _check_pattern(self, entry: str) -> None:
        """Raise if a pattern matches only one of the old and the new name of a module."""
        pattern = _PATTERN_PREFIXES.sub("", entry)
        try:
            match = re.compile(pattern).match
        except re.error:
            match = re.compile(re.escape(pattern)).search
        for before, after in self._new.items():
            same_match = bool(match(before)) == bool(match(after))
            if not same_match or (pattern in before) != (pattern in after):
                raise AptError(
                    f"config.json has the pattern {entry!r}, which matches {before} but not "
                    f"{after}, its name in the smaller model"
                    if match(before) or pattern in before
                    else f"config.json has the pattern {entry!r}, which matches {after}, the new "
                    f"name of {before}",
                    "list the modules by their names there",
                )


def _paths(name: str) -> Iterator[str]:
    """The names of the modules that contain a tensor, from the outermost one, then its own name."""
    end = name.find(".")
    while end >= 0:
        yield name[:end]
        end = name.find(".", end + 1)
    yield name


def _readings(entry: str) -> Iterator[tuple[str, str, str]]:
    """The modules that an entry may mean, as names of modules differ between loaders.

    Yields:
        The name of a module, the prefix of the entry that the name lacks, and the prefix of the
        name that the entry lacks.
    """
    yield entry, "", ""
    yield f"model.{entry}", "", "model."
    removed_prefix, module = "", entry
    for _ in range(3):
        first, dot, module = module.partition(".")
        if not dot:
            return
        removed_prefix += f"{first}."
        yield module, removed_prefix, ""
        yield f"model.{module}", removed_prefix, "model."
