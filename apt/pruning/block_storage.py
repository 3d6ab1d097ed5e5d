"""The storage of a model's blocks before and after they are pruned: in memory or on disk."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import nn

from apt.compute import round_parameter
from apt.events import Done


class BlockStorage(Protocol):
    """The storage of blocks, as the loop over blocks uses it.

    Attributes:
        repeatable: True if the activations before a block must be bit-identical when they are
            computed again from pruned blocks, as a resumed run does.
    """

    repeatable: bool

    def open(self, name: str, block: nn.Module) -> AbstractContextManager[None]:
        """A context in which the block's dense weights are in memory."""

    def pruned(self, name: str) -> list[Done] | None:
        """The records of the block from an earlier run; None if it is not pruned yet."""

    def restore(self, name: str, block: nn.Module) -> None:
        """Load the pruned weights of an earlier run into the block."""

    def keep(self, name: str, block: nn.Module, done: Sequence[Done]) -> None:
        """Store the pruned block and its records."""

    def stored_dtype(self, name: str) -> torch.dtype | None:
        """The dtype in which a parameter of that full name is stored; None for that in memory."""


class MemoryBlocks:
    """The storage of a model whose blocks are all in memory, before and after."""

    repeatable = False

    def open(self, name: str, block: nn.Module) -> AbstractContextManager[None]:
        """Do nothing: the weights are in memory."""
        return nullcontext()

    def pruned(self, name: str) -> list[Done] | None:
        """None: every run begins at the first block."""
        return None

    def restore(self, name: str, block: nn.Module) -> None:
        """Never called, since `pruned` returns None."""

    def keep(self, name: str, block: nn.Module, done: Sequence[Done]) -> None:
        """Do nothing: the block stays in memory."""

    def stored_dtype(self, name: str) -> torch.dtype | None:
        """None: a parameter is stored as it is in memory."""
        return None


class RoundedBlocks(MemoryBlocks):
    """Blocks in memory whose parameters are stored in other dtypes.

    As in a streamed run, the blocks after a pruned block get what its stored weights give.

    Args:
        dtypes: the stored dtypes by the full name of a parameter.
    """

    repeatable = True

    def __init__(self, dtypes: Mapping[str, torch.dtype]) -> None:
        self._dtypes = dtypes

    def keep(self, name: str, block: nn.Module, done: Sequence[Done]) -> None:
        """Round the parameters to their stored dtypes."""
        for path, parameter in block.named_parameters():
            whole = f"{name}.{path}"
            if (stored := self._dtypes.get(whole, parameter.dtype)) != parameter.dtype:
                round_parameter(whole, parameter, stored)

    def stored_dtype(self, name: str) -> torch.dtype | None:
        """The dtype in which a parameter of that full name is stored; None for that in memory."""
        return self._dtypes.get(name)
