"""The adapter protocol: everything that the core asks of a model family.

The core hands an adapter the model and asks for its blocks, the sites of a block, the inputs of
every block, one step through a block, and the capture of what multiplies each site's weight. What
flows between blocks (`State`) is the adapter's own business: a tensor for most families, more
where a residual is threaded beside it.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from apt.adapter.sites import Call, Effects, Extra, Sink, Site, State


class Adapter(Protocol):
    """What the core asks of a model family."""

    def check(self, config: Any) -> None:
        """Raise `AptError` where a configuration of the family cannot be served."""

    def positions(self, config: Any) -> int | None:
        """The longest sequence that a configuration allows; None where there is no limit."""

    def held(self, config: Any, seqlen: int) -> int:
        """How many values for each token a block's forward holds while a product waits, beside
        its inputs and the residual stream: matrices of attention, where it makes them."""

    def running(self, model: nn.Module) -> AbstractContextManager[None]:
        """Entered around everything that is run of a model: what its family needs meanwhile."""

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The blocks in order, with their full names.

        Raises:
            AptError: the model is not of this family.
        """

    def sites(self, block: nn.Module) -> list[Site]:
        """The sites of a block.

        Raises:
            AptError: a declared site is missing, or the block has a Linear that is not declared.
        """

    def extras(self, block: nn.Module) -> list[Extra]:
        """What can be pruned beside the sites, on request, in the order of execution."""

    def effects(
        self, block: nn.Module, extras: Sequence[Extra], sink: Effects
    ) -> AbstractContextManager[None]:
        """While entered, hand what an extra's weights do in each forward to ``sink``.

        That is, of each channel, the Gram matrix (channels, k, k) of what its weights multiply, or,
        for ``"effect"``, of what the removal of each changes in the block's product; and the energy
        of that product, which the loss is a share of.
        """

    def enter(self, model: nn.Module, tokens: Tensor) -> tuple[State, list[Call]]:
        """The state before the first block, and how each block is called, for one batch.

        Args:
            model: the whole model.
            tokens: token ids (samples, seqlen).
        """

    def step(self, block: nn.Module, state: State, call: Call) -> State:
        """Run one block."""

    def residual(self, state: State) -> Tensor:
        """The residual stream (samples, seqlen, hidden) in a state, as blocks begin with it."""

    def capture(
        self, block: nn.Module, sites: Sequence[Site], sink: Sink
    ) -> AbstractContextManager[None]:
        """While entered, hand every input (..., in) that a site's weight multiplies to ``sink``.

        Before the product is taken: the weight may be changed by then. Captures of several batches
        are entered at once, and their forwards run by turns; what a capture sees of another batch
        is ignored.
        """
