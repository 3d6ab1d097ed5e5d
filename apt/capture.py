"""What flows into each weight, summed over the calibration tokens, with coverage asserted."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Site, State
from apt.batches import Batch, Inputs, Reference
from apt.errors import AptError
from apt.ranks import Ranks
from apt.solver import Gram
from apt.solver.precision import full_precision
from apt.targets import Targets


@dataclass
class Sums:
    """Sums over the tokens of one input ``X`` (tokens, in) of the pruned stream.

    Attributes:
        gram: ``XᵀX``.
        cross: ``(X_dense − X)ᵀ X`` (in, in), where there is a dense stream and that is the cheaper
            way to what the sites have lost by their inputs.
        pull: ``Eᵀ X`` (out, in) by site, where ``E`` (tokens, out) is what it is to make up for
            beside that; see `apt.targets.Targets.error`.

    Beside a dense stream, the tokens of sites that write to the residual stream are weighted: the
    stream is normalised wherever it is read, so that an error counts relative to the token's own
    size. Unweighted, a few tokens with activations a hundred times larger would be all that counts.
    """

    gram: Gram
    cross: Tensor | None = None
    pull: dict[Site, Tensor] = field(default_factory=dict)

    def add_up(self, ranks: Ranks) -> None:
        """Add to them what the other ranks have summed."""
        if ranks.size == 1:
            return
        matrix = self.gram.matrix
        ranks.add(matrix, *([] if self.cross is None else [self.cross]), *self.pull.values())
        self.gram = Gram.from_sum(matrix, round(ranks.sum(self.gram.tokens)))


class _AllSeen(Exception):
    """Ends a run of the block: what comes after the last watched site is not needed."""


class Passing:
    """One batch on its way through a block, product by product.

    Attributes:
        tokens: the batch's tokens.
        reference: the dense stream beside it.
        drift: how far the residual stream (tokens, hidden) has drifted by now.
        seen: the tokens that each site's weight has been multiplied by, and in how many ``parts``.
    """

    def __init__(self, batch: Batch) -> None:
        self.tokens, self.reference = batch.tokens, batch.reference
        drift = batch.reference.drift if batch.reference is not None else None
        self.drift = drift.clone() if drift is not None else None
        self.seen: dict[Site, int] = defaultdict(int)
        self.parts: dict[Site, int] = defaultdict(int)
        self._owners: dict[str, Site] = {}
        self._anticipated: set[Site] = set()
        self._current: dict[str, list[Tensor]] = defaultdict(list)

    def owns(self, site: Site) -> bool:
        """Whether it is the first site that its input is given to."""
        return self._owners.setdefault(site.input, site) == site

    def keep(self, site: Site, rows: Tensor) -> None:
        """Keep what the first site of an input is given, to hold the others' against."""
        self._current[site.input].append(rows)

    def kept(self, site: Site, rows: Tensor) -> bool:
        """Whether the first site of the input was given the same."""
        parts, index = self._current[site.input], self.parts[site]
        return index < len(parts) and _same(parts[index], rows)

    def release(self, sites: Sequence[Site]) -> None:
        """Let go of the inputs that all of ``sites`` that share them have been given."""
        for name in [name for name in self._current if name in {site.input for site in sites}]:
            if all(self.done(site) for site in sites if site.input == name):
                del self._current[name]

    def here(self, site: Site, rows: Tensor) -> slice:
        """Which of the batch's tokens ``rows`` are."""
        start = self.seen[site] % self.tokens
        return slice(start, start + len(rows))

    def count(self, site: Site, rows: Tensor) -> None:
        """Count a product."""
        self.seen[site] += len(rows)
        self.parts[site] += 1

    def done(self, site: Site) -> bool:
        """Whether it has seen all of a batch; of a routed site that is not known before the end."""
        return not site.routed and self.seen[site] == site.calls * self.tokens

    def dense(self, site: Site, rows: Tensor) -> Tensor:
        """What the site's weight is multiplied by in the dense stream where it is by ``rows``."""
        assert self.reference is not None
        parts, index = self.reference.inputs[site.input], self.parts[site]
        if index >= len(parts) or parts[index].shape != rows.shape:
            raise AptError(
                f"{site.name} is multiplied by other tokens in the pruned stream than in the dense "
                "one: they cannot be held against each other",
                "prune with --layer-wise, or let the adapter declare it routed",
            )
        return parts[index]

    def anticipate(self, site: Site, here: slice, lost: Tensor) -> None:
        """Add to the drift what the product of a site would differ by with its weight dense.

        Args:
            site: a site that writes to the residual stream, and that is to be followed.
            here: the tokens.
            lost: ``(X_dense − X) Wᵀ`` (tokens, out).
        """
        assert self.drift is not None
        self.drift[here] += lost
        self._anticipated.add(site)

    @full_precision()
    def follow(self, site: Site, rows: Tensor, weight: Tensor, dense: Tensor) -> None:
        """Add to the drift what the site's product differs by between the two streams.

        Args:
            site: a site that writes to the residual stream.
            rows: its input (tokens, in).
            weight, dense: its weight (out, in), pruned and dense.
        """
        assert self.drift is not None
        here = self.drift[self.here(site, rows)]
        if site in self._anticipated:
            here += (rows @ (dense - weight).T).float()
        else:
            here += (self.dense(site, rows) @ dense.T).float()
            here -= (rows @ weight.T).float()


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
            if site in dense and passing.reference is not None:
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
            if passing.reference is None or site.routed:
                sums.gram.add(rows)
            else:
                self._sum_both(passing, site, rows, passing.reference)
        elif not passing.kept(site, rows):
            raise AptError(
                f"{site.name} is declared to share the input '{site.input}', but gets another one"
            )

    @full_precision()
    def _sum_both(self, passing: Passing, site: Site, rows: Tensor, reference: Reference) -> None:
        """Sum a batch of both streams; tokens weighted where a site writes to the stream."""
        assert reference.scale is not None
        assert passing.drift is not None
        sums, pruned, here = self.sums[site.input], rows.float(), passing.here(site, rows)
        lost, drift = passing.dense(site, rows).float() - pruned, passing.drift[here]
        root = weighted = pruned
        if any(s.residual for s in self._sharing[site.input]):
            root = pruned / reference.scale[here]
            weighted = root / reference.scale[here]
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


def _same(left: Tensor, right: Tensor) -> bool:
    if left.data_ptr() == right.data_ptr() and left.shape == right.shape:
        return True
    return left.shape == right.shape and torch.equal(left, right)


class _Keeper:
    """Keeps the inputs of a block's sites, each once."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._owners: dict[str, Site] = {}

    def keep(self, site: Site, rows: Tensor) -> None:
        """Keep what the first site of each input is given."""
        if self._owners.setdefault(site.input, site) == site:
            self._inputs.add(site.input, rows.reshape(-1, rows.shape[-1]))


def advance_reference(
    adapter: Adapter,
    block: nn.Module,
    index: int,
    batches: list[Batch],
    sites: Sequence[Site],
    ranks: Ranks | None = None,
    tell: Callable[[], None] = lambda: None,
) -> None:
    """Run the block, its weights still dense, on the dense stream; keep its sites' inputs.

    Told after each batch.
    """
    energy, ranks = 0.0, ranks or Ranks()
    for batch in batches:
        reference = batch.reference
        assert reference is not None
        dense = _stream(adapter, reference.state)
        reference.drift = dense - _stream(adapter, batch.state)
        squares = _sizes(dense)
        reference.scale = squares.sqrt()
        energy += float(squares.reciprocal().sum())
        reference.inputs.clear()
        keep = _Keeper(reference.inputs).keep
        with adapter.capture(block, [site for site in sites if not site.routed], keep):
            reference.state = adapter.step(block, reference.state, batch.calls[index])
        tell()
    tokens = ranks.sum(sum(batch.tokens for batch in batches))
    mean = math.sqrt(tokens / ranks.sum(energy))
    for batch in batches:
        assert batch.reference is not None
        assert batch.reference.scale is not None
        batch.reference.scale /= mean


def _sizes(stream: Tensor) -> Tensor:
    """The mean square of every token (tokens, 1), so bounded that none outweighs all others."""
    squares = stream.square().mean(1, keepdim=True)
    least = max(float(squares.median()) / 16, torch.finfo(squares.dtype).tiny)
    return squares.clamp(min=least)


def _stream(adapter: Adapter, state: State) -> Tensor:
    """The residual stream (tokens, hidden) in fp32."""
    stream = adapter.residual(state)
    return stream.float().reshape(-1, stream.shape[-1])
