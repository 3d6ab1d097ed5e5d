"""What flows into each weight, summed over the calibration tokens, with coverage asserted."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Site, State
from apt.batches import Batch, Reference
from apt.errors import AptError
from apt.solver import Gram
from apt.solver.precision import full_precision


@dataclass
class Sums:
    """Sums over the tokens of one input ``X`` (tokens, in) of the pruned stream.

    Attributes:
        gram: ``XᵀX``.
        cross: ``(X_dense − X)ᵀ X`` (in, in), where there is a dense stream.
        drift: ``Δᵀ X`` (out, in) of each site that writes to the residual stream, with ``Δ`` how
            far the stream has drifted right before the site's product is added.

    Beside a dense stream, the tokens of sites that write to the residual stream are weighted: the
    stream is normalised wherever it is read, so that an error counts relative to the token's own
    size. Unweighted, a few tokens with activations a hundred times larger would be all that counts.
    """

    gram: Gram
    cross: Tensor | None = None
    drift: dict[Site, Tensor] = field(default_factory=dict)


class _AllSeen(Exception):
    """Ends a run of the block: what comes after the last watched site is not needed."""


class Capture:
    """Takes the inputs of ``sites`` while their block runs, batch by batch.

    The sites of one input are fed the same tensor in turn, or the same parts of it, in the order of
    the tokens; it is summed for the first of them and checked, by identity or by value, for the
    others.

    Args:
        block: the block.
        sites: the sites whose inputs are summed.
        earlier: sites that write to the residual stream before those, with their dense weights:
            what has become of their outputs adds to the drift.
        reference: whether there is a dense stream.
    """

    def __init__(
        self,
        block: nn.Module,
        sites: Sequence[Site],
        earlier: dict[Site, Tensor] | None = None,
        *,
        reference: bool = False,
    ) -> None:
        self.sites, self.earlier = list(sites), earlier or {}
        self.weights = {s: s.oriented(s.weight(block).data) for s in [*sites, *self.earlier]}
        self.sums: dict[str, Sums] = {}
        for site in sites:
            width, device = self.weights[site].shape[1], self.weights[site].device
            both = reference and not site.routed
            cross = torch.zeros(width, width, device=device) if both else None
            self.sums.setdefault(site.input, Sums(Gram(width, device), cross))
        self.tokens = dict.fromkeys(sites, 0)
        self._seen: dict[Site, int] = {}
        self._parts: dict[Site, int] = {}
        self._owners: dict[str, Site] = {}
        self._current: dict[str, list[Tensor]] = {}
        self._expected = 0
        self._reference: Reference | None = None
        self._drift: Tensor | None = None

    def run(self, adapter: Adapter, block: nn.Module, index: int, batches: list[Batch]) -> None:
        """Run the block on all batches, as far as the last site."""
        with adapter.capture(block, list(self.weights), self._take):
            for batch in batches:
                self._seen = dict.fromkeys(self.weights, 0)
                self._parts = dict.fromkeys(self.weights, 0)
                self._owners.clear()
                self._current.clear()
                self._expected, self._reference = batch.tokens, batch.reference
                drift = batch.reference.drift if batch.reference else None
                self._drift = drift.clone() if drift is not None and self.earlier else drift
                with suppress(_AllSeen):
                    adapter.step(block, batch.state, batch.calls[index])
        self._assert_coverage(sum(batch.tokens for batch in batches))

    def _take(self, site: Site, inputs: Tensor) -> None:
        """Take ``inputs`` (..., in) of one product with the weight of ``site``."""
        width = self.weights[site].shape[1]
        if inputs.shape[-1] != width:
            raise AptError(
                f"{site.name} multiplies inputs of width {inputs.shape[-1]}, not "
                f"{width}: is it declared transposed the wrong way round?"
            )
        rows = inputs.reshape(-1, width)
        if site in self.tokens:
            self._sum(site, rows)
        if site in self.earlier and self._reference is not None:
            self._follow(site, rows, self._reference)
        self._seen[site] += len(rows)
        self._parts[site] += 1
        if all(self._done(s) for s in self.weights):
            raise _AllSeen

    def _done(self, site: Site) -> bool:
        """Whether it has seen all of a batch; of a routed site that is not known before the end."""
        return not site.routed and self._seen[site] == site.calls * self._expected

    def _sum(self, site: Site, rows: Tensor) -> None:
        sums = self.sums[site.input]
        self.tokens[site] += len(rows)
        if self._owners.setdefault(site.input, site) == site:
            self._current.setdefault(site.input, []).append(rows)
            if self._reference is None or site.routed:
                sums.gram.add(rows)
            else:
                self._sum_both(site, rows, sums, self._reference)
        elif not self._shared(site, rows):
            raise AptError(
                f"{site.name} is declared to share the input '{site.input}', but gets another one"
            )
        if site.residual and self._reference is not None:
            self._sum_drift(site, rows, sums, self._reference)

    def _shared(self, site: Site, rows: Tensor) -> bool:
        """Whether the first site of the input was given the same."""
        parts, index = self._current[site.input], self._parts[site]
        return index < len(parts) and _same(parts[index], rows)

    def _here(self, site: Site, rows: Tensor) -> slice:
        """Which of the batch's tokens ``rows`` are."""
        start = self._seen[site] % self._expected
        return slice(start, start + len(rows))

    @full_precision()
    def _sum_both(self, site: Site, rows: Tensor, sums: Sums, reference: Reference) -> None:
        """Sum a batch of both streams; tokens weighted where the site writes to the stream."""
        dense, pruned = self._dense(site, rows, reference), rows.float()
        lost = dense.float() - pruned
        if any(other.residual for other in self.sites if other.input == site.input):
            assert reference.scale is not None
            scale = reference.scale[self._here(site, rows)]
            pruned, lost = pruned / scale, lost / scale
        assert sums.cross is not None
        sums.gram.add(pruned)
        sums.cross.addmm_(lost.T, pruned)

    def _dense(self, site: Site, rows: Tensor, reference: Reference) -> Tensor:
        """What the site's weight is multiplied by in the dense stream where it is by ``rows``."""
        parts, index = reference.inputs[site.input], self._parts[site]
        if index >= len(parts) or parts[index].shape != rows.shape:
            raise AptError(
                f"{site.name} is multiplied by other tokens in the pruned stream than in the dense "
                "one: they cannot be held against each other",
                "prune with --layer-wise, or let the adapter declare it routed",
            )
        return parts[index]

    @full_precision()
    def _sum_drift(self, site: Site, rows: Tensor, sums: Sums, reference: Reference) -> None:
        assert self._drift is not None
        assert reference.scale is not None
        here = self._here(site, rows)
        pull = (self._drift[here] / reference.scale[here].square()).T @ rows.float()
        sums.drift[site] = sums.drift[site].add_(pull) if site in sums.drift else pull

    def _follow(self, site: Site, rows: Tensor, reference: Reference) -> None:
        """Add to the drift what the site's output differs by between the two streams."""
        assert self._drift is not None
        dense = self._dense(site, rows, reference) @ self.earlier[site].T
        pruned = rows @ self.weights[site].T
        self._drift[self._here(site, rows)] += (dense - pruned).float()

    def _assert_coverage(self, tokens: int) -> None:
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


def _same(left: Tensor, right: Tensor) -> bool:
    if left.data_ptr() == right.data_ptr() and left.shape == right.shape:
        return True
    return left.shape == right.shape and torch.equal(left, right)


class _Inputs:
    """Keeps the inputs of a block's sites, each once."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self._owners: dict[str, Site] = {}

    def keep(self, site: Site, rows: Tensor) -> None:
        """Keep what the first site of each input is given."""
        if self._owners.setdefault(site.input, site) == site:
            self.inputs.setdefault(site.input, []).append(rows.reshape(-1, rows.shape[-1]))


def advance_reference(
    adapter: Adapter, block: nn.Module, index: int, batches: list[Batch], sites: Sequence[Site]
) -> None:
    """Run the block, its weights still dense, on the dense stream; keep its sites' inputs."""
    energy = 0.0
    for batch in batches:
        reference = batch.reference
        assert reference is not None
        dense = _stream(adapter, reference.state)
        reference.drift = dense - _stream(adapter, batch.state)
        squares = _sizes(dense)
        reference.scale = squares.sqrt()
        energy += float(squares.reciprocal().sum())
        kept = _Inputs()
        with adapter.capture(block, [site for site in sites if not site.routed], kept.keep):
            reference.state = adapter.step(block, reference.state, batch.calls[index])
        reference.inputs = kept.inputs
    mean = math.sqrt(sum(batch.tokens for batch in batches) / energy)
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
