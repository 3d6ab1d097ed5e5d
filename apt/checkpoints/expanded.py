"""Quantised checkpoints, opened through plugins and read tensor by tensor like plain ones."""

import json
from collections.abc import Iterable
from dataclasses import replace
from math import prod

from torch import Tensor

from apt.checkpoints.formats import find_source_file, local_copy
from apt.checkpoints.quantised import QuantisedCheckpoint
from apt.checkpoints.safetensors_io import Entry, Shards
from apt.locations.model_source import Source
from apt.plugin.registry import Registry

# Fields of config.json; MLX has the second.
_QUANTISATION_FIELDS = ("quantization_config", "quantization")


class Expanded(Shards):
    """The tensors of a quantised checkpoint, each of which is expanded when it is read."""

    def __init__(self, checkpoint: QuantisedCheckpoint) -> None:
        self._checkpoint, self.files, self.about = checkpoint, list(checkpoint.files), {}
        self.entries = {
            name: Entry(
                self.files[0], each.dtype, each.shape, 0, prod(each.shape) * each.dtype.itemsize
            )
            for name, each in checkpoint.tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """Expand a tensor."""
        return self._checkpoint.read(name)

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Raise: expanded tensors have no bytes in the files."""
        raise NotImplementedError


def open_quantised(source: Source, registry: Registry) -> tuple[Source, QuantisedCheckpoint] | None:
    """The quantised checkpoint of a model, and its source; None if no plugin reads its format.

    A checkpoint on the hub is downloaded if its configuration says that it is quantised. The
    returned source is then the downloaded copy.

    Raises:
        AptError: the checkpoint is damaged.
    """
    if source.gguf is None:
        path = find_source_file(source, "config.json")
        try:
            config = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None  # the reading of the configuration reports the error
        if not isinstance(config, dict) or not any(
            config.get(name) for name in _QUANTISATION_FIELDS
        ):
            return None
        if source.on_hub:
            source = replace(source, location=str(local_copy(source)))
    for spec in registry.quantised_formats.specs.values():
        checkpoint: QuantisedCheckpoint | None = spec.load()(source)
        if checkpoint is not None:
            return source, checkpoint
    return None
