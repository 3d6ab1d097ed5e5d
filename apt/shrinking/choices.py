"""The interfaces of methods that choose groups or blocks of a whole model."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from apt.adapter import Adapter


class GroupScores(Protocol):
    """The importance of the groups of every block, by block and by kind.

    The groups of lowest importance are removed, the same number in each block.
    """

    def __call__(
        self, model: nn.Module, adapter: Adapter, tokens: Tensor, /
    ) -> Mapping[str, Mapping[str, Tensor]]:
        """Scores (count,) by block and kind, from calibration ``tokens`` (samples, seqlen)."""


class BlockChoice(Protocol):
    """The blocks to drop."""

    def __call__(
        self, model: nn.Module, adapter: Adapter, tokens: Tensor, count: int, /
    ) -> Sequence[str]:
        """The names of ``count`` blocks, from calibration ``tokens`` (samples, seqlen)."""
