"""One forward of a block that waits before every product with a site's weight.

A weight can then be solved from what it is about to be multiplied by, and the forward goes on with
the solved one. So the sites are solved in their order of execution, each on what the pruned ones
before it give, and what the pruned block gives is there at the end: all for a single forward.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Site, State
from apt.calibration.batches import Batch
from apt.calibration.capture import Capture, as_rows
from apt.calibration.passing import BlockPass
from apt.calibration.sums import Sums
from apt.calibration.targets import Targets
from apt.pruning.suspended import Suspended
from apt.pruning.warning_handler import can_keep

_Product = tuple[Site, Tensor]


class CannotWait(Exception):
    """A forward cannot wait before a product for all of its input: it has to be run again."""


_HELD = 32  # times the width of the residual stream


def may_wait(adapter: Adapter, config: Any, seqlen: int, width: int) -> bool:
    """Whether batches may wait within a block.

    What a forward holds for itself, all of them hold at once. That is about as much as the
    activations take that a run keeps anyway, unless it has matrices of attention of long samples.

    Args:
        adapter: the model's adapter.
        config: its configuration.
        seqlen: the tokens of a sample.
        width: that of the residual stream.
    """
    return adapter.held(config, seqlen) <= _HELD * width


class _Lane:
    """A batch's forward, and the product before which it waits."""

    def __init__(
        self, batch: Batch, run: Callable[["_Lane", Callable[[_Product], None]], State]
    ) -> None:
        self.batch, self.passing = batch, BlockPass(batch)
        self.products = Suspended[_Product, State](partial(run, self))
        self._started = False
        self._at: _Product | None = None

    @property
    def at(self) -> _Product | None:
        """The site whose product it waits before and its input (tokens, in); None at the end."""
        if not self._started:
            self.go_on()
        return self._at

    def go_on(self) -> None:
        """Go on to the next product that is waited before."""
        self._started = True
        self._at = next(self.products, None)


class Walk:
    """A walk of all batches through a block; a context manager.

    Args:
        adapter: the block's adapter.
        block, index: the block and its place among the blocks.
        batches: the batches before the block.
        sites: all sites of the block, none of which is routed or multiplied more than once.
        ahead: the sites among them that are to be captured; others of the same inputs stay dense.
        dense: the dense weights (out, in) of those that write to the residual stream.
        targets: how much of the error so far they make up for; None where there is no dense stream.
        tell: called whenever a batch has come to where it waits, or to the end.
    """

    def __init__(
        self,
        adapter: Adapter,
        block: nn.Module,
        index: int,
        batches: Sequence[Batch],
        sites: Sequence[Site],
        ahead: Sequence[Site],
        dense: Mapping[Site, Tensor],
        targets: Targets | None = None,
        tell: Callable[[], None] = lambda: None,
    ) -> None:
        self._tell = tell
        self._block, self._dense, self._targets = block, dense, targets
        self._weights = {site: site.oriented(site.weight(block).data) for site in sites}
        self._ahead: dict[str, list[Site]] = {}
        for site in ahead:
            self._ahead.setdefault(site.input, []).append(site)
        self._captures: dict[str, Capture] = {}
        self._tokens = sum(batch.tokens for batch in batches)
        self._running: _Lane | None = None
        self._settings: tuple[Any, ...] = ()
        self._lanes = [_Lane(batch, partial(self._forward, adapter, index)) for batch in batches]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._running = None
        with ExitStack() as stack:
            for lane in self._lanes:
                stack.callback(lane.products.close)

    def next_input(self) -> str | None:
        """Go on to the next input that is to be captured; None when all have been.

        Raises:
            AptError: the forward ends before it comes to one.
        """
        first = self._lanes[0]
        self._go(first, self._ahead)
        if first.at is not None:
            return first.at[0].input
        for sites in self._ahead.values():
            Capture(self._block, sites).assert_coverage(self._tokens)
        return None

    def capture(self, name: str) -> Sums:
        """Go on to an input in all batches, and sum it.

        Raises:
            CannotWait: it does not come whole, or the forward cannot wait there.
        """
        reached = []
        for lane in self._lanes:
            self._go(lane, (name,))
            if lane.at is None or len(lane.at[1]) != lane.passing.tokens:
                raise CannotWait
            reached.append((lane.passing, *lane.at))
        capture = Capture(self._block, self._ahead.pop(name), self._targets)
        for passing, site, rows in reached:
            capture.take(passing, site, rows)
        self._captures[name] = capture
        return capture.sums[name]

    def finish(self, *, leave: bool) -> None:
        """Go on to the end, with the weights as they are now.

        Args:
            leave: whether the batches' states become those after the block.

        Raises:
            AptError: a site was not given every token, or not what it is declared to share.
        """
        for lane in self._lanes:
            self._go(lane, ())
            if leave:
                lane.batch.state = lane.products.result
        for capture in self._captures.values():
            capture.assert_coverage(self._tokens)

    def _forward(
        self, adapter: Adapter, index: int, lane: _Lane, wait: Callable[[_Product], None]
    ) -> State:
        """A lane's forward; it waits before sites that are to be captured.

        Sites that stay dense may share their input: their products happen like any other.
        """

        def take(site: Site, inputs: Tensor) -> None:
            if lane is not self._running:  # a hook on the block is called for every lane
                return
            rows = as_rows(site, inputs, self._weights[site])
            if site in self._ahead.get(site.input, ()):
                if not can_keep() or _settings() != self._settings:
                    raise CannotWait
                wait((site, rows))
            self._pass(lane.passing, site, rows)

        with adapter.capture(self._block, list(self._weights), take):
            return adapter.step(self._block, lane.batch.state, lane.batch.calls[index])

    def _pass(self, passing: BlockPass, site: Site, rows: Tensor) -> None:
        """Let a product happen."""
        capture = self._captures.get(site.input)
        if capture is not None and capture.sums_up(site) and not passing.is_first(site):
            capture.take(passing, site, rows)
        if site in self._dense and self._drift_matters(passing):
            passing.add_drift(site, rows, self._weights[site], self._dense[site])
        passing.count(site, rows)
        if capture is not None:
            passing.release(capture.sites)

    @torch.no_grad()
    def _go(self, lane: _Lane, until: Collection[str]) -> None:
        """Let products happen until one of an input of these is next."""
        self._running, self._settings = lane, _settings()
        while lane.at is not None and lane.at[0].input not in until:
            lane.go_on()
        self._tell()

    def _drift_matters(self, passing: BlockPass) -> bool:
        """Whether a site is to be captured yet that is asked to make up for the drift."""
        ahead = (site for sites in self._ahead.values() for site in sites)
        return passing.dense is not None and any(site.residual for site in ahead)


def _settings() -> tuple[Any, ...]:
    """What torch has once for each thread, and a forward that waits would leave to the others."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
    )
