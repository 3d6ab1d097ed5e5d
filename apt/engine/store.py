"""The model of a run: its blocks, its dtypes, and the journal, folder and time of the run."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt.adapter import Samples
from apt.checkpoints.load import fingerprint
from apt.compute import ComputeDtype, Precision, compute_dtype
from apt.distributed.ranks import Ranks
from apt.events import Status
from apt.files.journal import Journal, Line
from apt.pruning.block_store import BlockStore
from apt.text.datasets import digest


class ModelStore(BlockStore):
    """The model of a run, with the journal, folder and time of the run.

    There are five kinds: a model of a program, `apt.engine.caller_model.CallerModel`; a checkpoint
    in memory, `apt.engine.in_memory.InMemory`; a checkpoint whose blocks stay on disk,
    `apt.engine.streamed.Streamed`; a quantised checkpoint, `apt.engine.in_place.InPlace`; and a
    checkpoint in memory that becomes one file, `apt.engine.in_file.InFile`.

    Attributes:
        journal: the journal of the run.
        folder: a folder for the files of a training.
        precision: the dtype of the stored weights, and the dtype that the model computes in.
        opening: the seconds until the model was open and measured.
        tuned: the names of the parameters that changed beside the pruned ones.
        rounded: the kinds of numbers in which changed tensors of a quantised checkpoint are
            rounded again, by their names.
    """

    folder: Path

    def __init__(
        self,
        ranks: Ranks | None = None,
        observe: Callable[[Any], None] = lambda event: None,
        status: Status = lambda phase, text="": None,
    ) -> None:
        super().__init__(ranks=ranks, observe=observe)
        self.status = status
        self._started, self.opening = time.perf_counter(), 0.0
        self.precision = Precision(torch.float32, torch.float32)  # until `compute_in`
        self._cast: ComputeDtype | None = None
        self.journal = Journal()
        self.tuned: tuple[str, ...] = ()
        self.rounded: dict[str, str] = {}

    @cached_property
    def weights(self) -> str:
        """The hash of the weights before the run changes them."""
        return fingerprint(self.model)

    def compute_in(
        self,
        compute: str,
        stored: torch.dtype,
        device: str,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        """Give the model the dtype that it computes in, until `restore`.

        Args:
            compute: the name of the dtype, or ``auto``; see `compute_dtype`.
            stored: the dtype of the model's sites.
            dtypes: the stored dtypes of the parameters that have another dtype in memory, by their
                full names.
        """
        _ = self.weights  # computes the hash before the cast
        self.precision = Precision(stored, compute_dtype(stored, device, compute))
        self._cast = ComputeDtype(self.model, self.precision.compute)
        self.dtypes = {**self._cast.stored, **(dtypes or {})}
        self.repeatable = any(
            parameter.dtype != self.dtypes.get(name, parameter.dtype)
            for name, parameter in self.model.named_parameters()
        )

    def restore(self) -> None:
        """Give the weights their stored dtypes again."""
        if self._cast is not None:
            self._cast.restore()
            self._cast = None

    @property
    def seconds(self) -> float:
        """The time since the beginning of the run."""
        return time.perf_counter() - self._started

    def shared_inputs(self, tokens: Tensor | Samples) -> Line:
        """The inputs that must be the same on all ranks: hashes of weights and tokens, dtypes."""
        hashes = {"weights": self.weights, "tokens": digest(tokens)}
        return hashes | self.precision.record()

    def readable(self) -> AbstractContextManager[None]:
        """While entered, the whole dense model can run."""
        return nullcontext()

    def generated(self, generate: Callable[[], Tensor], what: str = "calibration text") -> Tensor:
        """What ``generate`` returns, which runs the model: the first rank shares its samples.

        ``what`` says what it is.
        """
        self.status("generating text", f"generating {what}")
        return self.ranks.share(generate() if self.ranks.first else torch.empty(0))
