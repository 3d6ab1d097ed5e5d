"""An opened model, with its source, adapter and checkpoint."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from apt.adapter import Adapter
from apt.checkpoints.formats import Checkpoint
from apt.locations.model_source import Source
from apt.plugin.specs import AdapterSpec


@dataclass(frozen=True)
class Opened:
    """An opened model, with its source, adapter and checkpoint.

    Attributes:
        module, config: the model and its configuration, as objects of transformers.
        spec, adapter: the adapter of its family.
        checkpoint: the reader and writer of its format; None for the format of transformers.
    """

    source: Source
    module: nn.Module
    config: Any
    spec: AdapterSpec
    adapter: Adapter
    checkpoint: Checkpoint | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights by the configuration; fp32 if it names none."""
        return getattr(self.config, "dtype", None) or torch.float32
