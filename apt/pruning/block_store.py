"""The store of a model's blocks: the loop over blocks reads a block, changes it, and keeps it."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from apt.compute import round_parameter
from apt.events import Done


class BlockStore:
    """The blocks of a model in memory. A store whose blocks are elsewhere is a subclass.

    Args:
        dtypes: see below; by default every parameter is stored in its dtype in memory.

    Attributes:
        dtypes: the dtypes in which parameters are stored, by their full names.
        repeatable: True if the activations before a block must be bit-identical when they are
            computed again from kept blocks, as a resumed run does.
    """

    def __init__(self, dtypes: Mapping[str, torch.dtype] | None = None) -> None:
        self.dtypes: Mapping[str, torch.dtype] = dtypes or {}
        self.repeatable = bool(dtypes)

    def open(self, name: str, block: nn.Module) -> AbstractContextManager[None]:
        """A context in which the block's dense weights are in memory."""
        return nullcontext()

    def kept(self, name: str) -> list[Done] | None:
        """The records of a block that an earlier run has kept; None if it is not kept yet."""
        return None

    def read_kept(self, name: str, block: nn.Module) -> None:
        """Load the kept weights of an earlier run into an open block."""

    def keep(self, name: str, block: nn.Module, done: Sequence[Done]) -> None:
        """Keep a changed block, with its records.

        Its parameters are rounded to their stored dtypes: the blocks after it get the outputs that
        its stored weights give.
        """
        for path, parameter in block.named_parameters(remove_duplicate=False):
            whole = f"{name}.{path}"
            if (stored := self.dtypes.get(whole, parameter.dtype)) != parameter.dtype:
                round_parameter(whole, parameter, stored)
