"""What flows into each weight, summed over the calibration tokens, with coverage asserted."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Site
from apt.calibration.batches import Batch, DenseActivations
from apt.calibration.passing import Passing
from apt.calibration.sums import Sums
from apt.calibration.targets import Targets
from apt.errors import AptError
from apt.solver import Gram
from apt.solver.precision import full_precision


class _AllSeen(Exception):
    """Ends a run of the block: what comes after the last watched site is not needed."""


class Capture:
    """Sums the inputs of ``sites``, batch by batch.

    The sites of one input are fed the same tensor in turn, or the same parts of it, in the order of
    the tokens; it is summed for the first of them and checked, by identity or by value, for the
    others.

    Args:
        block: the block.
        sites: the sites whose inputs are summed, their weights still dense.
        targets: how much of the error so far they make up for; None where there is no dense stream.
        routed: the block's routed sites that stay dense. Their tokens are counted where ``sites``
            of the same order are routed: only all together are known to see every token.
    """

    def __init__(
        self,
        block: nn.Module,
        sites: Sequence[Site],
        targets: Targets | None = None,
        routed: Sequence[Site] = (),
    ) -> None:
        self.sites = list(sites)
        self.tokens = dict.fromkeys([*sites, *self._beside(sites, routed)], 0)
        self._targets = targets or Targets(0, 0)
        self._weights = {site: site.oriented(site.weight(block).data) for site in sites}
        self._sharing: dict[str, list[Site]] = defaultdict(list)
        for site in sites:
            self._sharing[site.input].append(site)
        self.sums = {
            name: self._empty(sharing, both=targets is not None and not sharing[0].routed)
            for name, sharing in self._sharing.items()
        }

    def sums_up(self, site: Site) -> bool:
        """Whether the inputs of a site are among those that are summed."""
        return site in self._weights

    @staticmethod
    def _beside(sites: Sequence[Site], routed: Sequence[Site]) -> list[Site]:
        """Those of ``routed`` that share an order with a routed one of ``sites``."""
        orders = {site.order for site in sites if site.routed}
        return [site for site in routed if site.order in orders]

    def _empty(self, sharing: Sequence[Site], *, both: bool) -> Sums:
        """The sums of an input, of one stream or both, before any token.

        What its sites have lost is summed once for all, at one product of (in, in) for each token,
        or site by site, at two of (out, in); where a site writes to the stream, one of these is
        needed in any case, for the drift.
        """
        first = self._weights[sharing[0]]
        width, device = first.shape[1], first.device
        sums = Sums(Gram(width, device))
        if not both:
            return sums
        if width < sum(len(self._weights[site]) * (2 - site.residual) for site in sharing):
            sums.cross = torch.zeros(width, width, device=device)
        sums.pull = {
            site: torch.zeros(self._weights[site].shape, device=device)
            for site in sharing
            if site.residual or sums.cross is None
        }
        return sums

    def run(
        self,
        adapter: Adapter,
        block: nn.Module,
        index: int,
        batches: list[Batch],
        dense: Mapping[Site, Tensor] | None = None,
        tell: Callable[[], None] = lambda: None,
    ) -> None:
        """Run the block on all batches, as far as the last site.

        Args:
            adapter: the block's adapter.
            block, index: the block and its place among the blocks.
            batches: the batches before the block.
            dense: of sites that write to the residual stream before ``sites`` do, the dense
                weights (out, in): what has become of their products adds to the drift.
            tell: called after each batch.
        """
        dense = dense or {}
        weights = {s: s.oriented(s.weight(block).data) for s in [*self.tokens, *dense]}
        passing: Passing

        def take(site: Site, inputs: Tensor) -> None:
            rows = as_rows(site, inputs, weights[site])
            if self.sums_up(site):
                self.take(passing, site, rows)
            elif site in self.tokens:
                self.tokens[site] += len(rows)
            if site in dense and passing.dense is not None:
                passing.follow(site, rows, weights[site], dense[site])
            passing.count(site, rows)
            passing.release(self.sites)
            if all(passing.done(s) for s in weights):
                raise _AllSeen

        with adapter.capture(block, list(weights), take):
            for batch in batches:
                passing = Passing(batch)
                with suppress(_AllSeen):
                    adapter.step(block, batch.state, batch.calls[index])
                tell()
        self.assert_coverage(sum(batch.tokens for batch in batches))

    def take(self, passing: Passing, site: Site, rows: Tensor) -> None:
        """Take what a site's weight is about to be multiplied by: ``rows`` (tokens, in)."""
        sums = self.sums[site.input]
        self.tokens[site] += len(rows)
        if passing.owns(site):
            passing.keep(site, rows)
            if passing.dense is None or site.routed:
                sums.gram.add(rows)
            else:
                self._sum_both(passing, site, rows, passing.dense)
        elif not passing.kept(site, rows):
            raise AptError(
                f"{site.name} is declared to share the input '{site.input}', but gets another one"
            )

    @full_precision()
    def _sum_both(
        self, passing: Passing, site: Site, rows: Tensor, dense: DenseActivations
    ) -> None:
        """Sum a batch of both streams; tokens weighted where a site writes to the stream."""
        assert dense.scale is not None
        assert passing.drift is not None
        sums, pruned, here = self.sums[site.input], rows.float(), passing.here(site, rows)
        lost, drift = passing.dense_input(site, rows).float() - pruned, passing.drift[here]
        root = weighted = pruned
        if any(s.residual for s in self._sharing[site.input]):
            root = pruned / dense.scale[here]
            weighted = root / dense.scale[here]
        sums.gram.add(root)
        if sums.cross is not None:
            sums.cross.addmm_(lost.T, weighted)
        own = {s: lost @ self._weights[s].float().T for s in sums.pull if sums.cross is None}
        for each, pull in sums.pull.items():
            error = self._targets.error(own.get(each), drift if each.residual else None)
            pull.addmm_(error.T, weighted)
        for each in own:
            if each.residual:
                passing.anticipate(each, here, own[each])

    def assert_coverage(self, tokens: int) -> None:
        """Raise where a site has not seen every one of ``tokens`` as often as it should."""
        for site, seen in self.tokens.items():
            if not site.routed and seen != site.calls * tokens:
                raise AptError(
                    f"{site.name} saw {seen:,} of {site.calls * tokens:,} calibration tokens: "
                    f"the adapter's capture misses {'some of ' if seen else ''}its inputs"
                )
        for order in {site.order for site in self.tokens if site.routed}:
            routed = sum(n for s, n in self.tokens.items() if s.routed and s.order == order)
            if not routed or routed % tokens:
                raise AptError(
                    f"the routed sites of order {order} saw {routed:,} tokens, no multiple of "
                    f"{tokens:,}: the adapter's capture misses some of their inputs"
                )


def as_rows(site: Site, inputs: Tensor, weight: Tensor) -> Tensor:
    """``inputs`` (..., in) of a site with ``weight`` (out, in) as (tokens, in)."""
    width = weight.shape[1]
    if inputs.shape[-1] != width:
        raise AptError(
            f"{site.name} multiplies inputs of width {inputs.shape[-1]}, not "
            f"{width}: is it declared transposed the wrong way round?"
        )
    return inputs.reshape(-1, width)
