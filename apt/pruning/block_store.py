"""The store of a model's blocks: the loop over blocks reads a block, changes it, and keeps it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Site
from apt.calibration.storage import MemoryStore, Store
from apt.compute import round_parameter
from apt.distributed.ranks import Ranks
from apt.events import BlockRecord
from apt.planning.plan import PlannedBlock
from apt.solver import Rounded


class BlockStore:
    """The blocks of a model in memory. A store whose blocks are elsewhere is a subclass.

    Args:
        model: the model; None if it is opened later.
        ranks: the processes that prune together. Each process has a store.
        observe: called with every event.

    Attributes:
        activations: the store of the activations between two blocks. If activations leave the
            device of the model, products are not stored either. The whole block is then run again
            for each stage of sites that is solved in order.
        dense_outer: the dense values of parameters outside the blocks that have changed before the
            first block, such as a rounded embedding: the dense stream begins with them.
        dtypes: the dtypes in which parameters are stored, by their full names.
        repeatable: True if a resumed run must get bit-identical activations before a block when it
            computes them again from kept blocks.
    """

    model: nn.Module

    def __init__(
        self,
        model: nn.Module | None = None,
        ranks: Ranks | None = None,
        observe: Callable[[Any], None] = lambda event: None,
    ) -> None:
        if model is not None:
            self.model = model
        self.ranks, self.observe = ranks or Ranks(), observe
        self.activations: Store = MemoryStore()
        self.dense_outer: Mapping[str, Tensor] = {}
        self.dtypes: Mapping[str, torch.dtype] = {}
        self.repeatable = False

    def open(self, name: str, block: nn.Module) -> AbstractContextManager[None]:
        """A context in which the block's dense weights are in memory."""
        return nullcontext()

    def planned(self, block: PlannedBlock) -> PlannedBlock:
        """The plan of the next block, which may depend on the blocks before it."""
        return block

    def kept(self, name: str) -> list[BlockRecord] | None:
        """The records of a block that an earlier run has kept; None if no run has kept it."""
        return None

    def read_kept(self, name: str, block: nn.Module) -> None:
        """Load the kept weights of an earlier run into an open block."""

    def keep_rounded(self, name: str, site: Site, weight: Rounded) -> None:
        """Keep the stored form of a rounded weight, for a file that stores its integers.

        Args:
            name: the full name of its parameter.
            site: the site of the weight: a parameter may be a stack of several weights.
            weight: the weight on its grid.
        """

    def keep(self, name: str, block: nn.Module, done: Sequence[BlockRecord]) -> None:
        """Keep a changed block, with its records.

        Its parameters are rounded to their stored dtypes, so that later blocks receive the outputs
        of the stored weights.
        """
        for path, parameter in block.named_parameters(remove_duplicate=False):
            full_name = f"{name}.{path}"
            if (dtype := self.dtypes.get(full_name, parameter.dtype)) != parameter.dtype:
                round_parameter(full_name, parameter, dtype)
