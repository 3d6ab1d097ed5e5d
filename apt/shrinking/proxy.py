"""Approximations of smaller models, to compare their losses without pruning each of them.

One pass over the dense model gives the Gram matrix of the inputs of every reader of groups. From
it follow the order in which the groups of a reader are removed and the exact weights without any
number of them. An approximation of a smaller model has these weights, and skips dropped blocks.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Adapter, Groups, Site
from apt.adapter.eval_mode import eval_mode
from apt.calibration.batches import enter
from apt.calibration.capture import as_rows
from apt.shrinking.skipping import loss_without
from apt.solver import ColumnGroups, Gram, SolverOptions, keep_columns, removal_order


@dataclass(frozen=True)
class _Reader:
    """A reader of groups, with its dense weight (out, in) and the Gram matrix of its inputs."""

    site: Site
    groups: Groups
    dense: Tensor
    gram: Gram


class Proxy:
    """The approximations of the smaller models of a model; its weights are dense between calls.

    Args:
        model: the dense model.
        adapter: the adapter of its family.
        tokens: calibration token ids (samples, seqlen) for the Gram matrices. They stay in memory:
            one (in, in) matrix in fp32 for each reader.
        options: the damping.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        tokens: Tensor,
        options: SolverOptions,
    ) -> None:
        self._model, self._adapter = model, adapter
        self._options = options
        self._blocks = dict(adapter.blocks(model))
        self._readers: dict[str, list[_Reader]] = {}
        self._orders: dict[tuple[str, str], Tensor] = {}
        self._solved: dict[tuple[str, str, int], Tensor] = {}
        self._collect(tokens)

    @torch.no_grad()
    def loss(self, kept: Mapping[str, int], dropped: Collection[str], tokens: Tensor) -> float:
        """The mean loss per token of a smaller model.

        Args:
            kept: the number of groups of each kind; kinds that are not named keep all.
            dropped: the names of the blocks that are dropped.
            tokens: token ids (windows, seqlen).
        """
        with self._narrowed(kept, dropped):
            return loss_without(self._model, self._adapter, tokens, dropped)

    @contextmanager
    def _narrowed(self, kept: Mapping[str, int], dropped: Collection[str]) -> Iterator[None]:
        """Inside the context, the readers of the blocks that are kept have fewer columns."""
        changed = [
            (self._blocks[name], reader, self._weight(name, reader, kept[reader.groups.kind]))
            for name, readers in self._readers.items()
            for reader in readers
            if name not in dropped and reader.groups.kind in kept
        ]
        try:
            for block, reader, weight in changed:
                reader.site.oriented(reader.site.weight(block).data).copy_(weight)
            yield
        finally:
            for block, reader, _ in changed:
                reader.site.oriented(reader.site.weight(block).data).copy_(reader.dense)

    def _weight(self, block: str, reader: _Reader, kept: int) -> Tensor:
        """The weight of a reader without all but ``kept`` groups."""
        key = (block, reader.site.name, kept)
        if key not in self._solved:
            groups, dense = reader.groups, reader.dense.float()
            removed = ColumnGroups(groups.count, kept, groups.bins).mask(
                self._order(block, reader)[: groups.count - kept]
            )
            columns = removed.repeat_interleave(dense.shape[1] // groups.count).to(dense.device)
            solution = keep_columns(dense, reader.gram.damped(self._options.damping), columns)
            self._solved[key] = solution.weight.to(reader.dense.dtype)
        return self._solved[key]

    def _order(self, block: str, reader: _Reader) -> Tensor:
        """The order of removal of all groups but one of each bin, for all readers of the groups."""
        key = (block, reader.groups.kind)
        if key not in self._orders:
            last = next(r for r in reversed(self._readers[block]) if r.groups is reader.groups)
            pattern = ColumnGroups(last.groups.count, last.groups.bins, last.groups.bins)
            dense = last.dense.float()
            self._orders[key] = removal_order(dense, last.gram, pattern, self._options)
        return self._orders[key]

    @torch.no_grad()
    def _collect(self, tokens: Tensor) -> None:
        """Sum the inputs of all readers in one pass over the model."""
        config = getattr(self._model, "config", None)
        with eval_mode(self._model), self._adapter.running(self._model):
            batches = enter(self._adapter, self._model, tokens)
            for index, (name, block) in enumerate(self._blocks.items()):
                readers = self._readers[name] = _readers(self._adapter, block, config)
                grams = {reader.site: reader.gram for reader in readers}
                weights = {reader.site: reader.dense for reader in readers}

                def add(
                    site: Site,
                    inputs: Tensor,
                    grams: dict[Site, Gram] = grams,
                    weights: dict[Site, Tensor] = weights,
                ) -> None:
                    grams[site].add(as_rows(site, inputs, weights[site]))

                with self._adapter.capture(block, list(grams), add):
                    for batch in batches:
                        batch.state = self._adapter.step(block, batch.state, batch.calls[index])


def _readers(adapter: Adapter, block: nn.Module, config: Any) -> list[_Reader]:
    """The readers of all groups of a block, with empty Gram matrices."""
    sites = {site.name: site for site in adapter.sites(block)}
    grams, found = dict[str, Gram](), list[_Reader]()
    for groups in adapter.groups(block, config):
        for name in groups.readers:
            site = sites[name]
            dense = site.oriented(site.weight(block).data).clone()
            gram = grams.setdefault(name, Gram(dense.shape[1], dense.device))
            found.append(_Reader(site, groups, dense, gram))
    return found
