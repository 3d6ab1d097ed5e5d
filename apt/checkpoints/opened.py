"""An opened model, with its source, adapter and checkpoint."""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from apt.adapter import Adapter
from apt.checkpoints.architecture import Reads, reads_of
from apt.checkpoints.formats import Checkpoint
from apt.checkpoints.quantised import QuantisedCheckpoint
from apt.checkpoints.skeletons import skeleton_module
from apt.checkpoints.towers import tower_of
from apt.compute import compute_dtype
from apt.errors import AptError
from apt.locations.model_source import Source
from apt.plugin.specs import AdapterSpec


@dataclass(frozen=True)
class Opened:
    """An opened model, with its source, adapter and checkpoint.

    Attributes:
        module, config: the model and its configuration, as objects of transformers.
        spec, adapter: the adapter of its family.
        checkpoint: the reader and writer of its format; None for the format of transformers.
        compute: the compute dtype of a planned run; None for `dtype`.
        quantised: the quantised checkpoint, if its tensors are expanded when they are read.
        plain: the reader of a GGUF file whose weights, once read, are those of a plain model.
        whole: the multimodal model of which ``module`` is a tower, without weights; else None.
    """

    source: Source
    module: nn.Module
    config: Any
    spec: AdapterSpec
    adapter: Adapter
    checkpoint: Checkpoint | None = None
    compute: torch.dtype | None = None
    quantised: QuantisedCheckpoint | None = None
    plain: QuantisedCheckpoint | None = None
    whole: nn.Module | None = None

    def skeleton(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A new model without weights; see `skeleton_module`."""
        trust = self.source.trust_remote_code
        if self.whole is None:
            return skeleton_module(self.config, dtype, trust_remote_code=trust)
        config, examples = cast(Any, self.whole.config), cast(Any, self.module).examples
        whole = skeleton_module(config, dtype, trust_remote_code=trust)
        return tower_of(whole, self.source.tower, examples)

    @property
    def reads(self) -> Reads:
        """What the model reads."""
        return reads_of(type(self.module), self.config)

    def check_windows(self, what: str) -> None:
        """Raise `AptError` if the model does not predict the next token of text.

        Args:
            what: the command or option that needs such a model.
        """
        if not self.reads.windows:
            name = self.source.reference or "the model"
            raise AptError(
                f"{what} needs a model that predicts the next token, and {name} reads "
                f"{self.reads.words} ({type(self.module).__name__})"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights by the configuration; fp32 if it names none."""
        whole: Any = self.whole and self.whole.config
        dtypes = (getattr(config, "dtype", None) for config in (self.config, whole))
        return next(filter(None, dtypes), torch.float32)

    @property
    def runs_in(self) -> torch.dtype:
        """The compute dtype of a planned run."""
        return self.compute or self.dtype

    def computing(self, name: str, device: str, dtype: torch.dtype | None = None) -> "Opened":
        """The same model with the compute dtype of a planned run.

        Args:
            name: the name of the compute dtype, or ``auto``.
            device: the device of the run.
            dtype: the dtype to which the weights are cast; None for that of the configuration.
        """
        return replace(self, compute=compute_dtype(dtype or self.dtype, device, name))
