"""The adapter protocol: the complete interface that the core requires of a model family.

An adapter returns the blocks of a model, the sites of a block and the calls of every block. It
runs one block, and it captures the inputs that each site's weight multiplies. The core does not
interpret the state between blocks (`State`): it is a tensor in most families, and a tuple if blocks
pass more than the residual stream.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from apt.adapter.groups import Groups
from apt.adapter.permutations import Permutable
from apt.adapter.samples import ModelInputs
from apt.adapter.sites import Call, Effects, Extra, Sink, Site, State


class Adapter(Protocol):
    """The interface of a model family."""

    def check(self, config: Any) -> None:
        """Raise `AptError` if the adapter does not support this configuration of the family."""

    def positions(self, config: Any) -> int | None:
        """The length of the longest sequence that a configuration allows; None if unlimited."""

    def held(self, config: Any, seqlen: int) -> int:
        """The number of values per token in the attention matrices of a forward of a block.

        0 if the forward computes none.
        """

    def running(self, model: nn.Module) -> AbstractContextManager[None]:
        """A context manager around every run of the model or a block, with the family's setup."""

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The blocks in order, with their full names.

        Raises:
            AptError: the model is not of this family.
        """

    def stacks(self, model: nn.Module) -> list[tuple[str, list[tuple[str, nn.Module]]]]:
        """The chains of blocks, such as an encoder and a decoder, by name, in the order of a run.

        Together they are the `blocks`.
        """

    def sites(self, block: nn.Module) -> list[Site]:
        """The sites of a block.

        Raises:
            AptError: a declared site is missing, or the block has a Linear that is not declared.
        """

    def extras(self, block: nn.Module) -> list[Extra]:
        """The parameters other than sites that are pruned on request, in order of execution."""

    def effects(
        self, block: nn.Module, extras: Sequence[Extra], sink: Effects
    ) -> AbstractContextManager[None]:
        """Inside the context, report statistics of each extra in each forward to ``sink``.

        The statistics are a Gram matrix for each channel (channels, k, k) and the energy of the
        product, by which the loss is divided. The vectors of the Gram matrix are the inputs that
        the weights multiply; for ``removal="effect"``, they are the changes of the product by the
        removal of each weight.
        """

    def groups(self, block: nn.Module, config: Any) -> list[Groups]:
        """The groups of a block that can be removed, by kind; none if the family has none.

        Only kinds that a configuration of the family can express are listed.
        """

    def permutable(self, block: nn.Module, config: Any) -> list[Permutable]:
        """The inputs of sites that can be reordered without a change of the block's function."""

    def tables(self, block: nn.Module, call: Call) -> Mapping[str, Tensor]:
        """Further rows (rows, in) that sites multiply in each run of a block, by their input.

        They are no tokens and do not depend on the samples, such as a table of relative positions
        that passes through the matrices of queries and keys. `capture` leaves them out.

        Args:
            call: the call of the block.
        """

    def enter(self, model: nn.Module, tokens: ModelInputs) -> tuple[State, list[Call]]:
        """The state before the first block, and the call of each block of the first stack.

        Args:
            model: the whole model.
            tokens: the inputs of one batch; token ids (samples, seqlen) for a decoder alone.
        """

    def enter_next(
        self, model: nn.Module, tokens: ModelInputs, ends: Sequence[State]
    ) -> tuple[State, list[Call]]:
        """The state before the first block of a later stack, and the call of each of its blocks.

        Args:
            model: the whole model.
            tokens: the inputs of one batch.
            ends: the states after all earlier stacks, which the model passes on.
        """

    def step(self, block: nn.Module, state: State, call: Call) -> State:
        """Run one block."""

    def residual(self, state: State) -> Tensor:
        """The residual stream (samples, seqlen, hidden) at the start of a block, from its state."""

    def capture(
        self, block: nn.Module, sites: Sequence[Site], sink: Sink
    ) -> AbstractContextManager[None]:
        """Inside the context, pass every input (..., in) of a site's weight to ``sink``.

        ``sink`` must be called before the product is computed, since it may end the forward.
        """
