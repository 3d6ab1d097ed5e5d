"""Approximations of smaller models, to compare their losses without pruning each of them.

One pass over the dense model gives the Gram matrix of the inputs of every reader of groups, and the
streams between the blocks. The Gram matrix of a reader gives the order in which its groups are
removed, and its exact weights for every number of removed groups. The streams give the fit of a
gap. An approximation of a smaller model has these weights, and skips dropped blocks.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Groups, Site
from apt.adapter.recording import eval_mode
from apt.calibration.batches import Batch, enter
from apt.calibration.capture import as_rows
from apt.pruning.layer import mean_square
from apt.shrinking.gap_fits import GapFits
from apt.shrinking.skipping import loss_without
from apt.solver import ColumnGroups, Gram, SolverOptions, keep_columns, removal_order

_GAP_TOKENS = 16384  # the greatest number of tokens whose streams stay in memory


@dataclass(frozen=True)
class _Reader:
    """A reader of groups, with the Gram matrix of its inputs."""

    site: Site
    groups: Groups
    gram: Gram

    def pattern(self, kept: int) -> ColumnGroups:
        """The pattern of its columns."""
        count, bins = self.groups.count, self.groups.bins
        if self.groups.apart:
            columns = self.groups.columns_of(self.site.name)
            return ColumnGroups(columns, kept * columns // count)
        return ColumnGroups(count, kept, bins)


class Proxy:
    """The approximations of the smaller models of a model; its weights are dense between calls.

    Args:
        tokens: calibration token ids (samples, seqlen). One (in, in) Gram matrix in fp32 for each
            reader stays in memory.
        kinds: the kinds of groups of which some may be removed.
        fit_gaps: True if the block before a gap is fitted to the dropped blocks. The streams of
            about 16 thousand tokens between all blocks stay in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        tokens: Tensor,
        options: SolverOptions,
        kinds: Collection[str],
        *,
        fit_gaps: bool = False,
    ) -> None:
        self._model, self._adapter = model, adapter
        self._options, self._kinds = options, kinds
        self._names, self._blocks = zip(*adapter.blocks(model), strict=True)
        self._readers: list[list[_Reader]] = []
        self._orders: dict[tuple[int, str], Tensor] = {}
        self._values: dict[tuple[int, str, int | None, int], Tensor] = {}
        with eval_mode(model), adapter.running(model):
            batches = enter(adapter, model, tokens)
            first = batches[: max(1, _GAP_TOKENS // batches[0].tokens)]
            self._gaps = GapFits(adapter, self._blocks, first, options)
            self._fit_gaps = fit_gaps
            self._collect(batches)

    @torch.no_grad()
    def loss(self, kept: Mapping[str, int], dropped: Collection[str], tokens: Tensor) -> float:
        """The mean loss per token of a smaller model.

        Args:
            kept: the number of groups of each kind; kinds that are not named keep all.
            tokens: token ids (windows, seqlen).
        """
        with _temporary_values(list(self._changes(kept, dropped))):
            return loss_without(self._model, self._adapter, tokens, dropped)

    def _changes(
        self, kept: Mapping[str, int], dropped: Collection[str]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The dense weights (out, in) that a smaller model changes, with their new values."""
        kept_blocks = [i for i, name in enumerate(self._names) if name not in dropped]
        for index, behind in zip(kept_blocks, [*kept_blocks[1:], len(self._names)], strict=True):
            narrowed = {r.site: r for r in self._readers[index] if r.groups.kind in kept}
            gap = self._fit_gaps and behind > index + 1
            writer = self._gaps.writer(index) if gap else None
            for site in dict.fromkeys([*narrowed, *([writer] if writer else [])]):
                reader, end = narrowed.get(site), behind if site == writer else index + 1
                count = kept[reader.groups.kind] if reader else None
                key = (index, site.name, count, end)
                if key not in self._values:
                    self._values[key] = self._new_weight(index, site, reader, count, end)
                yield self._weight(index, site), self._values[key]

    def _weight(self, index: int, site: Site) -> Tensor:
        return site.oriented(site.weight(self._blocks[index]).data)

    def _new_weight(
        self, index: int, site: Site, reader: _Reader | None, kept: int | None, behind: int
    ) -> Tensor:
        """A weight fitted to the gap up to ``behind``, with ``kept`` groups."""
        weight = self._weight(index, site)
        value = weight.float()
        if behind > index + 1:
            value = value + self._gaps.change(index, behind)
        if reader is not None and kept is not None:
            pattern = reader.pattern(kept)
            removed = pattern.mask(self._order(index, reader)[: pattern.removed])
            columns = pattern.columns(removed, value.shape[1]).to(value.device)
            damped = reader.gram.damped(self._options.damping)
            value = keep_columns(value, damped, columns).weight
        return value.to(weight.dtype)

    def _order(self, index: int, reader: _Reader) -> Tensor:
        """The order of removal of the groups, without the last one of each bin.

        It is the same for all readers, unless the groups are apart: each reader then has an order.
        """
        groups = reader.groups
        key = (index, reader.site.name if groups.apart else groups.kind)
        if key not in self._orders:
            deciding = next(r for r in reversed(self._readers[index]) if r.groups is groups)
            deciding = reader if groups.apart else deciding
            dense, pattern = (
                self._weight(index, deciding.site).float(),
                deciding.pattern(groups.bins),
            )
            self._orders[key] = removal_order(dense, deciding.gram, pattern, self._options)
        return self._orders[key]

    @torch.no_grad()
    def _collect(self, batches: Sequence[Batch]) -> None:
        """Sum the inputs of all readers, and record the streams, in one pass over the model."""
        config = getattr(self._model, "config", None)
        for index, block in enumerate(self._blocks):
            self._readers.append(self._readers_of(block, config))
            grams = {reader.site: reader.gram for reader in self._readers[index]}
            weights = {site: self._weight(index, site) for site in grams}

            def add(
                site: Site,
                inputs: Tensor,
                grams: dict[Site, Gram] = grams,
                weights: dict[Site, Tensor] = weights,
            ) -> None:
                grams[site].add(as_rows(site, inputs, weights[site]))

            if self._fit_gaps:
                self._gaps.record()
            with self._adapter.capture(block, list(grams), add):
                for batch in batches:
                    batch.state = self._adapter.step(block, batch.state, batch.calls[index])
            self._readers[-1] = _with_missing_tokens(self._readers[-1])
        if self._fit_gaps:
            self._gaps.record()

    def _readers_of(self, block: nn.Module, config: Any) -> list[_Reader]:
        """The readers of the groups of a block, with empty Gram matrices."""
        sites = {site.name: site for site in self._adapter.sites(block)}
        grams, readers = dict[str, Gram](), list[_Reader]()
        for groups in self._adapter.groups(block, config):
            for name in groups.readers if groups.kind in self._kinds else ():
                weight = sites[name].oriented(sites[name].weight(block).data)
                gram = grams.setdefault(name, Gram(weight.shape[1], weight.device))
                readers.append(_Reader(sites[name], groups, gram))
        return readers


def _with_missing_tokens(readers: Sequence[_Reader]) -> list[_Reader]:
    """The readers, with missing tokens added to the Gram matrices of experts."""
    mean = mean_square(reader.gram for reader in readers if reader.site.routed)
    return [
        replace(reader, gram=reader.gram.with_missing_tokens(mean))
        if reader.site.routed
        else reader
        for reader in readers
    ]


@contextmanager
def _temporary_values(changes: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Inside the context, the weights have other values."""
    dense = [weight.clone() for weight, _ in changes]
    try:
        for weight, value in changes:
            weight.copy_(value)
        yield
    finally:
        for (weight, _), value in zip(changes, dense, strict=True):
            weight.copy_(value)
