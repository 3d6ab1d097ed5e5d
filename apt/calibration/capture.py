"""The capture of the inputs of sites: sums over the calibration tokens, and checks of coverage."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Call, Site
from apt.calibration.batches import Batch, DenseActivations, OpenBlock
from apt.calibration.passing import BlockPass
from apt.calibration.targets import Sums, Targets
from apt.errors import AptError
from apt.solver import Gram
from apt.solver.precision import full_precision


class _AllSeen(BaseException):
    """Ends a run of the block after its last watched site; no ``except Exception`` stops it."""


class Capture:
    """Sums the inputs of ``sites``, batch by batch.

    Sites that share an input receive the same tensor one after another, or the same parts of it in
    the order of the tokens. The input is summed at the first of these sites. The inputs of the
    other sites are compared with it, by identity or by value.

    Args:
        sites: the sites whose inputs are summed; their weights are still dense.
        targets: the error-aware targets; None if there is no dense stream.
        routed: the block's routed sites that stay dense. Their tokens are counted if ``sites``
            contains routed sites of the same order: only the experts together receive every token.
    """

    def __init__(
        self,
        block: nn.Module,
        sites: Sequence[Site],
        targets: Targets | None = None,
        routed: Sequence[Site] = (),
    ) -> None:
        self.sites = list(sites)
        orders = {site.order for site in sites if site.routed}
        counted = [site for site in routed if site.order in orders]
        self.tokens = dict.fromkeys([*sites, *counted], 0)
        self._targets = targets or Targets(0, 0)
        self._weights = {site: site.oriented(site.weight(block).data) for site in sites}
        self._sharing: dict[str, list[Site]] = defaultdict(list)
        for site in sites:
            self._sharing[site.input].append(site)
        self.sums = {
            name: self._empty_sums(
                sharing, both_streams=targets is not None and not sharing[0].routed
            )
            for name, sharing in self._sharing.items()
        }

    def _empty_sums(self, sharing: Sequence[Site], *, both_streams: bool) -> Sums:
        """The empty sums of an input, for both streams or for the pruned one alone.

        The error of the inputs is summed in the cheaper way. Either ``cross`` is summed once for
        all sites that share the input, at one product of (in, in) for each token. Or the error is
        summed for each site in ``error_products``, at two products of (out, in) for each token.
        Sites that write to the residual stream need one of these products for the drift in any
        case.
        """
        first = self._weights[sharing[0]]
        width, device = first.shape[1], first.device
        sums = Sums(Gram(width, device))
        if not both_streams:
            return sums
        summed = {site: site.residual or bool(site.added_to) for site in sharing}
        if width < sum(len(self._weights[site]) * (2 - summed[site]) for site in sharing):
            sums.cross = torch.zeros(width, width, device=device)
        sums.error_products = {
            site: torch.zeros(self._weights[site].shape, device=device)
            for site in sharing
            if site.residual or site.added_to or sums.cross is None
        }
        return sums

    def run(
        self,
        block: OpenBlock,
        dense: Mapping[Site, Tensor] | None = None,
        passes: Iterable[BlockPass] | None = None,
        unsolved: Collection[Site] = (),
    ) -> None:
        """Run the block on all batches, up to the last site.

        Args:
            dense: the dense weights (out, in) of sites that write to the residual stream before
                ``sites``: the change of their products is added to the drift.
            passes: the passes of the batches, if they go on from earlier stages.
            unsolved: the sites of this and later stages.
        """
        dense = dense or {}
        summands = self._summands(block)
        watched = [*self.tokens, *dense, *summands]
        weights = {s: s.oriented(s.weight(block.module).data) for s in watched}
        passing: BlockPass | None = None

        def take(site: Site, inputs: Tensor) -> None:
            if passing is None:
                raise AptError(f"{site.name} is captured after the block has run: that is too late")
            if all(passing.done(s) for s in weights):  # the block has caught the exception
                raise _AllSeen
            rows = as_rows(site, inputs, weights[site])
            if site in summands:
                passing.keep_summand(site, rows)
            if site in self._weights:
                self.take(passing, site, rows)
            elif site in self.tokens:
                self.tokens[site] += len(rows)
            if site in dense and passing.dense is not None:
                passing.add_drift(site, rows, weights[site], dense[site])
            passing.count(site, rows)
            passing.release(self._sharing.get(site.input, ()))
            if all(passing.done(s) for s in weights):
                raise _AllSeen

        passes = passes or map(BlockPass, block.batches)
        for batch, current in zip(block.batches, passes, strict=True):
            sink, watched = current.aside(take), list(weights)
            with current.run(unsolved), block.adapter.capture(block.module, watched, sink):
                passing = current
                with suppress(_AllSeen):
                    block.step(batch, batch.state)
                passing = None
            grams = {name: sums.gram for name, sums in self.sums.items()}
            _add_tables(block.adapter, block.module, batch.calls[block.index], grams)
            block.progress()
        self.assert_coverage(block.batches)

    def _summands(self, block: OpenBlock) -> list[Site]:
        """A site for each input to which a product of the summed sites is added."""
        names = {site.added_to for site in self.sites if site.added_to} - {""}
        if not names or not any(sums.error_products for sums in self.sums.values()):
            return []
        first = {site.input: site for site in reversed(block.adapter.sites(block.module))}
        return [first[name] for name in sorted(names)]

    def take(self, passing: BlockPass, site: Site, rows: Tensor) -> None:
        """Add an input ``rows`` (tokens, in) of a site, before its product is computed."""
        self.tokens[site] += len(rows)
        if passing.is_first(site):
            if len(self._sharing[site.input]) > 1:
                passing.keep(site, rows)
            if passing.dense is None or site.routed:
                self.sums[site.input].gram.add(rows, passing.sample_of(site))
            else:
                self._sum_both(passing, site, rows, passing.dense)
        elif not passing.equals_kept(site, rows):
            raise AptError(
                f"{site.name} is declared to share the input '{site.input}', but its input differs"
            )

    @full_precision()
    def _sum_both(
        self, passing: BlockPass, site: Site, rows: Tensor, dense: DenseActivations
    ) -> None:
        """Sum a batch of both streams, with weighted tokens if a site writes to the stream."""
        assert dense.scale is not None
        assert passing.drift is not None
        sums, pruned, tokens = self.sums[site.input], rows.float(), passing.token_slice(site, rows)
        difference, drift = passing.dense_input(site, rows).float() - pruned, passing.drift[tokens]
        scaled = weighted = pruned
        if any(s.residual for s in self._sharing[site.input]):
            scaled = pruned / dense.scale[tokens]
            weighted = scaled / dense.scale[tokens]
        sums.gram.add(scaled, passing.sample_of(site))
        if sums.cross is not None:
            sums.cross.addmm_(difference.T, weighted)
        input_errors = {
            s: difference @ self._weights[s].float().T
            for s in sums.error_products
            if sums.cross is None
        }
        for member, product in sums.error_products.items():
            summand = passing.summand_drift(member, tokens) if member.added_to else None
            error = self._targets.error(
                input_errors.get(member), drift if member.residual else summand
            )
            if member.residual and member.input == dense.gap_input and dense.gap is not None:
                error = error + dense.gap[tokens]
            product.addmm_(error.T, weighted)
        for member in input_errors:
            if member.residual:
                passing.add_input_drift(member, tokens, input_errors[member])

    def assert_coverage(self, batches: Sequence[Batch]) -> None:
        """Raise if a site has not received each token exactly ``site.calls`` times."""
        for site, count in self.tokens.items():
            expected = site.calls * sum(batch.tokens_of(site) for batch in batches)
            if not site.routed and count != expected:
                raise AptError(
                    f"{site.name} saw {count:,} of {expected:,} calibration tokens: "
                    f"the adapter's capture misses {'some of ' if count else ''}its inputs"
                )
        tokens = sum(batch.tokens for batch in batches)
        for order in {site.order for site in self.tokens if site.routed}:
            routed = sum(n for s, n in self.tokens.items() if s.routed and s.order == order)
            if not routed or routed % tokens:
                raise AptError(
                    f"the routed sites of order {order} saw {routed:,} tokens, not a multiple of "
                    f"{tokens:,}: the adapter's capture misses some of their inputs"
                )


def grams_of(
    adapter: Adapter, block: nn.Module, index: int, sites: Sequence[Site], batches: Iterable[Batch]
) -> dict[str, Gram]:
    """The Gram matrices of the inputs of dense sites, by input; the batches pass the block.

    Args:
        index: the index of the block in the model.
    """
    first, grams = dict[str, Site](), dict[str, Gram]()
    weights = {site: site.oriented(site.weight(block).detach()) for site in sites}
    for site in sites:
        if first.setdefault(site.input, site) is site:
            grams[site.input] = Gram(weights[site].shape[1], weights[site].device)

    def add(site: Site, inputs: Tensor) -> None:
        if first[site.input] is site:
            grams[site.input].add(as_rows(site, inputs, weights[site]))

    with adapter.capture(block, sites, add):
        for batch in batches:
            batch.state = adapter.step(block, batch.state, batch.calls[index])
            _add_tables(adapter, block, batch.calls[index], grams)
    return grams


def _add_tables(adapter: Adapter, block: nn.Module, call: Call, grams: Mapping[str, Gram]) -> None:
    """Add the rows that are no tokens, and are the same in both streams."""
    tables = adapter.tables(block, call)
    for name in tables.keys() & grams.keys():
        grams[name].add(tables[name])


def as_rows(site: Site, inputs: Tensor, weight: Tensor) -> Tensor:
    """The ``inputs`` (..., in) of a site with ``weight`` (out, in), reshaped to (tokens, in)."""
    width = weight.shape[1]
    if inputs.shape[-1] != width:
        raise AptError(
            f"{site.name} multiplies inputs of width {inputs.shape[-1]}, not "
            f"{width}: check its declaration of 'transposed'"
        )
    return inputs.reshape(-1, width)
