"""Permutations: inputs of a site that can be reordered without a change of the function.

The rows that produce the inputs, and their biases, are reordered in the same way. The channels of
an MLP and the values of each key/value head are such inputs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter.groups import Groups, Part, columns, rows
from apt.adapter.sites import Site


@dataclass(frozen=True)
class Permutable:
    """Inputs of a site that can be reordered.

    An order (bins × size,) has the former index of the entry at each position. Entries stay in
    their bin.

    Args:
        reader: the name of the site.
        parts: the entries of all parameters that are reordered, columns of the reader included. A
            part has ``each`` entries in every bin: the entries of the bin once, or repeated, if
            several query heads share the values of a key/value head.
        size: the number of entries in a bin.
        bins: the number of bins.
        expert: the index of an expert; then only its slices of stacked parameters (experts, …) are
            reordered. None if the parameters are not stacked.
    """

    reader: str
    parts: tuple[Part, ...]
    size: int
    bins: int = 1
    expert: int | None = None

    def places(self, part: Part, order: Tensor) -> Tensor:
        """The former index of each entry of a part (bins × each,), in the dimension of the part."""
        copies = part.each // self.size
        firsts = self.size * torch.arange(self.bins * copies, device=order.device)
        within = order.view(self.bins, 1, self.size) % self.size
        return part.start + (firsts.view(self.bins, copies, 1) + within).flatten()

    def order_of(self, columns: Tensor) -> Tensor:
        """The order (bins × size,) that corresponds to an order of the reader's columns."""
        first = columns.view(self.bins, -1, self.size)[:, 0] % self.size
        bins = torch.arange(self.bins, device=columns.device).unsqueeze(1)
        return (first + self.size * bins).flatten()

    def random_order(self) -> Tensor:
        """A random order, the same in each call."""
        draw = torch.Generator().manual_seed(0)
        bins = [torch.randperm(self.size, generator=draw) for _ in range(self.bins)]
        return torch.cat([self.size * index + order for index, order in enumerate(bins)])

    def permute(self, parameters: Mapping[str, Tensor], order: Tensor) -> None:
        """Put the entries of the parameters, by path within the block, into an order."""
        for part in self.parts:
            entries = parameters[part.parameter].detach().movedim(part.dim, -1)
            entries = (entries if self.expert is None else entries[self.expert]).movedim(-1, 0)
            places = self.places(part, order.to(entries.device))
            entries.narrow(0, part.start, len(places)).copy_(entries[places])


def columns_of(permutable: Permutable, reader: Site) -> Part | None:
    """The part of the reader's columns; None if it is not declared."""
    dim = int(not reader.transposed) + (reader.expert is not None)
    parts = (p for p in permutable.parts if (p.parameter, p.dim) == (reader.parameter, dim))
    return next(parts, None)


def permutable_channels(groups: Sequence[Groups], sites: Sequence[Site]) -> Iterator[Permutable]:
    """The channels of an MLP, and of each expert.

    Args:
        groups: the groups of a block. Groups with one reader and one column each are channels, and
            so are groups that are apart.
        sites: the sites of the block.
    """
    site_of, done_readers = {site.name: site for site in sites}, set[str]()
    for each in groups:
        single = len(each.readers) == 1 and not (each.routed or each.apart or each.outputs)
        if single and each.bins == 1 and all(part.each == 1 for part in each.parts):
            parts = tuple(replace(part, each=each.count) for part in each.parts)
            done_readers.add(each.readers[0])
            yield Permutable(each.readers[0], parts, each.count)
    for each in (each for each in groups if each.apart):
        for reader in (site_of[name] for name in each.readers if name not in done_readers):
            if (permutable := _channels_of(each, reader)) is not None:
                yield permutable


def _channels_of(groups: Groups, reader: Site) -> Permutable | None:
    """The channels of one reader of groups that are apart; None if a stack has them in pairs."""
    stacked, size = reader.expert is not None, groups.columns_of(reader.name)
    reader_parts = [
        part for part in groups.parts if part.reader == ("" if stacked else reader.name)
    ]
    if stacked and any(part.each > 1 for part in reader_parts):
        return None
    parts = tuple(replace(part, each=size, reader="") for part in reader_parts)
    return Permutable(reader.name, parts, size, expert=reader.expert)


def attention_values(
    block: nn.Module, config: Any, value: str = "self_attn.v_proj", output: str = "self_attn.o_proj"
) -> Permutable:
    """The values of each key/value head of an attention with a separate Linear for values.

    Args:
        block: the block.
        config: the configuration, with ``num_attention_heads`` and, if key/value heads are shared,
            ``num_key_value_heads``.
        value, output: the paths of the Linears within the block.
    """
    heads = config.num_attention_heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    size = block.get_parameter(f"{output}.weight").shape[1] // heads
    parts = (*rows(block, value, size), columns(output, heads // key_value_heads * size))
    return Permutable(output, parts, size, key_value_heads)
