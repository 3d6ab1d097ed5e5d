"""Checkpoints in formats other than that of transformers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers.utils.hub import cached_file

from apt.checkpoints.load_errors import load_error
from apt.locations.hub import Hub
from apt.locations.model_source import Source
from apt.plugin.registry import Registry


class Checkpoint(Protocol):
    """A checkpoint in another format, of a model that transformers supports.

    Attributes:
        config: the configuration, as an object of transformers.
    """

    config: Any

    def read(self) -> dict[str, Tensor]:
        """The weights by their names in transformers, each in its stored dtype."""

    def write(self, weights: Mapping[str, Tensor], directory: Path) -> None:
        """Write weights, given by their names in transformers, and the configuration, in the format
        of the checkpoint."""


def find_file(location: str, name: str, hub: Hub | None = None) -> Path | None:
    """A file of a local directory or of a repository on the hub; None if there is no such file.

    Raises:
        OSError: there is no such repository, the hub does not answer, or it denies access.
    """
    options = {"_raise_exceptions_for_missing_entries": False, **(hub or Hub()).options()}
    path = cached_file(location, name, **options)
    return Path(path) if path else None


def find_source_file(source: Source, name: str) -> Path | None:
    """A file of a model, or None; raises `AptError` if the search fails, as without a network."""
    try:
        return find_file(source.location, name, source.hub)
    except (OSError, ValueError) as error:
        raise load_error(source, error, "check the network and the name") from error


def local_copy(source: Source, ignored: Sequence[str] = ()) -> Path:
    """The directory of a checkpoint; one on the hub is downloaded without ``ignored`` patterns."""
    if not source.on_hub:
        return Path(source.location)
    from huggingface_hub import snapshot_download

    options = source.hub.options()
    return Path(snapshot_download(source.location, ignore_patterns=list(ignored), **options))


def open_checkpoint(source: Source, registry: Registry) -> Checkpoint | None:
    """The checkpoint, if a plugin reads its format; None if transformers must read it."""
    path = find_source_file(source, "config.json")
    if path is None:
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(config, dict) or "model_type" in config:
        return None
    # Plugins use the hub with default settings. With other settings the checkpoint is downloaded.
    location = str(local_copy(source)) if source.hub != Hub() else source.location
    for spec in registry.formats.specs.values():
        checkpoint: Checkpoint | None = spec.load()(location, config)
        if checkpoint is not None:
            return checkpoint
    return None
