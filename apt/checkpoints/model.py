"""A model with what is needed to prune it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from apt.adapter import Adapter
from apt.checkpoints.formats import Checkpoint
from apt.locations.model_source import Source
from apt.plugin.specs import AdapterSpec


@dataclass(frozen=True)
class Model:
    """A loaded model with what is needed to prune it.

    Attributes:
        source: where it is read from.
        module, config: the model and its configuration, as transformers has them.
        spec, adapter: the adapter of its family.
        checkpoint: what reads and writes it where it is not in transformers' own format.
    """

    source: Source
    module: nn.Module
    config: Any
    spec: AdapterSpec
    adapter: Adapter
    checkpoint: Checkpoint | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the checkpoint's weights, as far as its configuration says."""
        return getattr(self.config, "dtype", None) or torch.float32
