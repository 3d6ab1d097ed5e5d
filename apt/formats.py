"""Checkpoints that are not laid out as transformers does it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers.utils.hub import cached_file

from apt.plugins import Registry


class Checkpoint(Protocol):
    """A checkpoint in a format of its own, of a model that transformers has too.

    Attributes:
        config: the configuration as transformers has it.
    """

    config: Any

    def read(self) -> dict[str, Tensor]:
        """The weights by transformers' names, each in the dtype that it is stored in."""

    def write(self, weights: Mapping[str, Tensor], directory: Path) -> None:
        """Write weights, by transformers' names, with the configuration in the checkpoint's own
        format."""


def find_file(location: str, name: str) -> Path | None:
    """A file of a directory here or of a repository on the hub; None where it is not there."""
    try:
        found = cached_file(location, name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return None
    return Path(found) if found else None


def open_checkpoint(location: str, registry: Registry) -> Checkpoint | None:
    """The checkpoint, if it is in a format that a plugin reads; None leaves it to transformers."""
    path = find_file(location, "config.json")
    if path is None:
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(config, dict) or "model_type" in config:
        return None
    for spec in registry.formats.specs.values():
        checkpoint: Checkpoint | None = spec.load()(location, config)
        if checkpoint is not None:
            return checkpoint
    return None
