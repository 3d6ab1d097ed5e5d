"""Where a model's blocks are while they have no turn: in memory, or on disk."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import nn

from apt.events import SitePruned


class BlockStorage(Protocol):
    """What the loop over blocks asks for around each block's turn.

    Attributes:
        repeatable: whether what flows into a block must be the same to the bit when it is made
            again from pruned blocks, as by a run that goes on where another ended.
    """

    repeatable: bool

    def open(self, name: str, block: nn.Module) -> AbstractContextManager[None]:
        """The block's dense weights are in memory while this is entered."""

    def pruned(self, name: str) -> list[SitePruned] | None:
        """What an earlier run did to the block; None where it has not been pruned yet."""

    def restore(self, name: str, block: nn.Module) -> None:
        """Put in place what an earlier run made of the block."""

    def keep(self, name: str, block: nn.Module, sites: Sequence[SitePruned]) -> None:
        """Take what has been made of the block."""


class MemoryBlocks:
    """All blocks are in memory, before and after."""

    repeatable = False

    def open(self, name: str, block: nn.Module) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()

    def pruned(self, name: str) -> list[SitePruned] | None:
        """Every run begins at the first block."""
        return None

    def restore(self, name: str, block: nn.Module) -> None:
        """Never asked for."""

    def keep(self, name: str, block: nn.Module, sites: Sequence[SitePruned]) -> None:
        """It stays where it is."""
