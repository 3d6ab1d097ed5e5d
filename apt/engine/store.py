"""The place of a model while a task changes it: in memory, or with its blocks on disk."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt.calibration.storage import MemoryStore, Store
from apt.checkpoints.load import fingerprint
from apt.distributed.ranks import Ranks
from apt.files.journal import Journal
from apt.pruning.block_storage import BlockStorage, MemoryBlocks


class ModelStore:
    """A model in memory, and the surroundings of a run.

    Attributes:
        model: the model.
        blocks: the storage of its blocks.
        activations: the store of the calibration activations between two blocks.
        journal: the journal of the run.
        folder: a folder for what a training keeps on disk.
    """

    model: nn.Module
    folder: Path

    def __init__(
        self,
        ranks: Ranks | None = None,
        observe: Callable[[Any], None] = lambda event: None,
        status: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.ranks, self.observe, self.status = ranks or Ranks(), observe, status
        self._started = time.perf_counter()
        self.blocks: BlockStorage = MemoryBlocks()
        self.activations: Store = MemoryStore()
        self.journal = Journal()

    @cached_property
    def weights(self) -> str:
        """The hash of the weights, before they change."""
        return fingerprint(self.model)

    @property
    def seconds(self) -> float:
        """The time since the beginning of the run."""
        return time.perf_counter() - self._started

    def readable(self) -> AbstractContextManager[None]:
        """While entered, the whole dense model can run."""
        return nullcontext()

    def generated(self, generate: Callable[[], Tensor]) -> Tensor:
        """The samples that ``generate`` returns, which runs the model: the same on all ranks."""
        self.status("generating calibration text")
        return self.ranks.share(generate() if self.ranks.first else torch.empty(0))
