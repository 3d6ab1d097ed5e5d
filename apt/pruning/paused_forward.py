"""Forwards of a block that pause before every product with a site's weight.

During the pause, the weight is solved from the inputs that it is about to multiply; the forward
then continues with the solved weight. So the sites are solved in their order of execution, each on
the outputs of the pruned sites before it (true-sequential pruning), and the forward ends with the
output of the pruned block. All this takes a single forward per batch.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Site, State
from apt.calibration.batches import Batch, OpenBlock
from apt.calibration.capture import Capture, as_rows
from apt.calibration.passing import BlockPass
from apt.calibration.targets import Sums, Targets
from apt.devices import kinds
from apt.pruning.suspended import Suspended, can_preserve_handler

_Product = tuple[Site, Tensor]


class CannotPause(Exception):
    """A forward cannot pause before a product with its whole input: the block must be run again."""


_MAX_VALUES = 32  # per token, in units of the width of the residual stream


def can_pause(adapter: Adapter, config: Any, seqlen: int, width: int) -> bool:
    """True if batches can pause within a block without too much memory.

    The paused forwards of all batches keep their intermediate values at the same time. These take
    about as much memory as the stored activations of a run, except for attention matrices of long
    samples.
    """
    return adapter.held(config, seqlen) <= _MAX_VALUES * width


class _PausedForward:
    """The forward of one batch, which pauses before products."""

    def __init__(
        self, batch: Batch, run: Callable[["_PausedForward", Callable[[_Product], None]], State]
    ) -> None:
        self.batch, self.block_pass = batch, BlockPass(batch)
        self.products = Suspended[_Product, State](partial(run, self))
        self._started = False
        self._next_product: _Product | None = None

    @property
    def next_product(self) -> _Product | None:
        """The site and the input (tokens, in) of the product it pauses before; None at the end."""
        if not self._started:
            self.advance()
        return self._next_product

    def advance(self) -> None:
        """Continue to the next product of a site that is to be captured."""
        self._started = True
        self._next_product = next(self.products, None)


class PausedForwards:
    """The paused forwards of all batches through a block; a context manager.

    Args:
        block: the block. It reports when a batch has reached a pause or the end.
        sites: all sites of the block, none of which is routed or multiplied more than once.
        to_capture: the sites among them that are to be captured; others of the same inputs stay
            dense.
        dense: the dense weights (out, in) of the sites that write to the residual stream; none
            without a dense stream.
        targets: the error-aware targets; None if there is no dense stream.
    """

    def __init__(
        self,
        block: OpenBlock,
        sites: Sequence[Site],
        to_capture: Sequence[Site],
        dense: Mapping[Site, Tensor],
        targets: Targets | None = None,
    ) -> None:
        self._block, self._dense, self._targets = block, dense, targets
        self._weights = {site: site.oriented(site.weight(block.module).data) for site in sites}
        self._pending: dict[str, list[Site]] = {}
        for site in to_capture:
            self._pending.setdefault(site.input, []).append(site)
        self._captures: dict[str, Capture] = {}
        self._tokens = sum(batch.tokens for batch in block.batches)
        self._active: _PausedForward | None = None
        self._settings: tuple[Any, ...] = ()
        self._state = _state(block.module)
        self._forwards = [_PausedForward(batch, self._run) for batch in block.batches]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._active = None
        with ExitStack() as stack:
            for forward in self._forwards:
                stack.callback(forward.products.close)

    def next_input(self) -> str | None:
        """Continue the first batch to the next input to capture; None after the last."""
        first = self._forwards[0]
        self._advance_to(first, self._pending)
        if first.next_product is not None:
            return first.next_product[0].input
        for sites in self._pending.values():
            Capture(self._block.module, sites).assert_coverage(self._tokens)
        return None

    def capture(self, name: str) -> dict[str, Sums]:
        """Continue all batches to the input ``name``, and sum it; the sums are under its name.

        Raises:
            CannotPause: the input comes in parts, or the forward cannot pause there.
        """
        reached = []
        for forward in self._forwards:
            self._advance_to(forward, (name,))
            if (
                forward.next_product is None
                or len(forward.next_product[1]) != forward.block_pass.tokens
            ):
                raise CannotPause
            reached.append((forward.block_pass, *forward.next_product))
        capture = Capture(self._block.module, self._pending.pop(name), self._targets)
        for block_pass, site, rows in reached:
            capture.take(block_pass, site, rows)
        self._captures[name] = capture
        return capture.sums

    def finish(self, *, update_states: bool) -> None:
        """Continue all batches to the end of the block, with the present weights.

        Raises:
            AptError: a site did not receive every token, or not the input that it is declared to
                share.
        """
        for forward in self._forwards:
            self._advance_to(forward, ())
            if update_states:
                forward.batch.state = forward.products.result
        for capture in self._captures.values():
            capture.assert_coverage(self._tokens)

    def _run(self, forward: _PausedForward, pause: Callable[[_Product], None]) -> State:
        """Run the forward of a batch, and pause before sites that are to be captured."""

        def take(site: Site, inputs: Tensor) -> None:
            if forward is not self._active:  # a hook on the block fires for every batch
                return
            rows = as_rows(site, inputs, self._weights[site])
            if site in self._pending.get(site.input, ()):
                if not can_preserve_handler() or _settings() != self._settings:
                    raise CannotPause
                state = _state(self._block.module)
                if state.keys() != self._state.keys() or any(
                    state[key] is not self._state[key] for key in state
                ):
                    raise CannotPause  # the forward of another batch would overwrite it
                pause((site, rows))
            self._record_product(forward.block_pass, site, rows)

        block = self._block
        with block.adapter.capture(block.module, list(self._weights), take):
            return block.step(forward.batch, forward.batch.state)

    def _record_product(self, block_pass: BlockPass, site: Site, rows: Tensor) -> None:
        """Add a product to the sums, the drift and the counts, just before it is computed."""
        capture = self._captures.get(site.input)
        if capture is not None and capture.sums_up(site) and not block_pass.is_first(site):
            capture.take(block_pass, site, rows)
        if site in self._dense and self._drift_matters(block_pass):
            block_pass.add_drift(site, rows, self._weights[site], self._dense[site])
        block_pass.count(site, rows)
        if capture is not None:
            block_pass.release(capture.sites)

    @torch.no_grad()
    def _advance_to(self, forward: _PausedForward, until: Collection[str]) -> None:
        """Continue until the next product is one with an input of ``until``, or to the end."""
        self._active, self._settings = forward, _settings()
        while forward.next_product is not None and forward.next_product[0].input not in until:
            forward.advance()
        self._block.progress()

    def _drift_matters(self, block_pass: BlockPass) -> bool:
        """True if a site that is still to be captured compensates for the drift."""
        pending = (site for sites in self._pending.values() for site in sites)
        return block_pass.dense is not None and any(site.residual for site in pending)


def _state(block: nn.Module) -> dict[tuple[str, str], Tensor]:
    """The tensors that are plain attributes of modules, such as the state of a recurrence."""
    return {
        (path, name): value
        for path, module in block.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }


def _settings() -> tuple[Any, ...]:
    """Settings of torch that belong to the thread; a forward that changes them does not pause."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in kinds()),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
    )
