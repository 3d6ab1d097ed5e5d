"""The sizes of smaller models that a configuration can express, and their parameters."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import lcm
from typing import Any

import torch
from torch import nn

from apt.adapter import Adapter, Groups
from apt.adapter.groups import without
from apt.checkpoints.smaller import resized
from apt.errors import AptError

TOLERANCE = 0.005
"""The largest deviation of the cost of a model from the requested share."""

MULTIPLE = 64
"""The default multiple of the number of channels: kernels are fast with such widths."""

_FEW = 256  # kinds with fewer groups, such as heads, can have any number of groups


@dataclass(frozen=True)
class Size:
    """The size of a smaller model.

    Args:
        kept: the number of groups of each kind in every block; kinds that keep all are left out.
        share: the share of the blocks' parameters that is kept.
        cost: the share of the budget: ``share``, or the share of the blocks' time on this machine.
    """

    kept: Mapping[str, int]
    blocks: int
    share: float
    cost: float

    def __str__(self) -> str:
        numbers = {"blocks": self.blocks, **self.kept}
        return ", ".join(
            f"{count} {kind.removesuffix('s') if count == 1 else kind}"
            for kind, count in numbers.items()
        )


class Sizes:
    """All sizes of the smaller models of a model.

    Args:
        model: the model; it may be a skeleton.
        multiple: the multiple that a number of channels must be.
        seconds: the time of a block with given numbers of groups, if the budget is time.
        experts: True if experts alone are reduced by default.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        config: Any,
        multiple: int,
        seconds: Callable[[Mapping[str, int]], float] | None = None,
        *,
        experts: bool = False,
    ) -> None:
        self._seconds, self._experts = seconds, experts
        self._blocks, self._adapter, self._config = adapter.blocks(model), adapter, config
        self.multiple, self.blocks = multiple, len(self._blocks)
        self.groups = {
            groups.kind: groups
            for _, block in self._blocks
            for groups in adapter.groups(block, config)
        }
        self._check_groups()
        self._kinds = _kinds(self._blocks, adapter, config)
        self._counts: dict[tuple[_Kind, tuple[tuple[str, int], ...]], int] = {}
        self._dense_count = self._parameters({})

    def _check_groups(self) -> None:
        """Raise if a configuration contradicts itself."""
        if not self.blocks:
            raise AptError("the model has no blocks", "is its config.json damaged?")
        for kind, groups in self.groups.items():
            if not groups.count or groups.count % groups.bins:
                message = f"{groups.count} {kind} in {groups.bins} equal parts are not possible"
                raise AptError(message, "is its config.json damaged?")

    def nearest_sizes(self, keep: float, depths: Sequence[int], *, width: bool) -> list[Size]:
        """The sizes with ``depths`` blocks whose cost is nearest to ``keep``, the nearest first.

        Every combination of the number of blocks and of groups is completed by the best number of
        groups of the largest kind.
        """
        nearest = (
            min(sizes, key=lambda s: abs(s.cost - keep))
            for sizes in self._combinations(depths, width)
        )
        smaller = [size for size in nearest if size.kept or size.blocks < self.blocks]
        return sorted(smaller, key=lambda size: (round(abs(size.cost - keep), 6), -size.cost))

    def smaller_sizes(self, depths: Sequence[int], *, width: bool) -> list[Size]:
        """All sizes with ``depths`` blocks that are below the full size, the smallest first."""
        all_sizes = (size for sizes in self._combinations(depths, width) for size in sizes)
        smaller = [size for size in all_sizes if size.kept or size.blocks < self.blocks]
        return sorted(smaller, key=lambda size: size.cost)

    def _combinations(self, depths: Sequence[int], width: bool) -> Iterator[Iterator[Size]]:
        """The sizes for each number of blocks, and of groups of all kinds except the largest."""
        for kept in self._small_kind_counts() if width else [dict[str, int]()]:
            for blocks in depths:
                yield self._completions(kept, blocks, width=width)

    def size(self, counts: Mapping[str, int | float], blocks: int) -> Size:
        """The size with these numbers, or shares, of groups of each kind.

        Raises:
            AptError: a kind or a number is not possible.
        """
        kept = {kind: self._count_of(kind, number) for kind, number in counts.items()}
        for kind, count in kept.items():
            if kind not in self.groups:
                known = ", ".join(self.groups) or "no groups"
                raise AptError(f"the model has no {kind} to remove", f"it has: {known}", ("sizes",))
            groups = self.groups[kind]
            least = max(groups.least, groups.step)
            if not least <= count <= groups.count or count % groups.step:
                step = f", in steps of {groups.step}" if groups.step > 1 else ""
                message = f"{kind} can be {least} to {groups.count}{step}, not {count}"
                raise AptError(message, "give another number", ("sizes",))
        if not 0 < blocks <= self.blocks:
            message = f"the number of blocks can be 1 to {self.blocks}, not {blocks}"
            raise AptError(message, "give another number", ("blocks",))
        reduced = {kind: n for kind, n in kept.items() if n < self.groups[kind].count}
        resized(self._config, self._removals(reduced), range(blocks), self.blocks)
        return self._size_of(reduced, blocks)

    def _count_of(self, kind: str, wanted: int | float) -> int:
        """The number of groups for a number or a share, with the same number in each bin."""
        if isinstance(wanted, int) or kind not in self.groups:
            return int(wanted)
        groups = self.groups[kind]
        return round(wanted * groups.count / groups.step) * groups.step

    def _size_of(self, kept: Mapping[str, int], blocks: int) -> Size:
        share = self._parameters(kept) / self._dense_count * blocks / self.blocks
        if self._seconds is None:
            return Size(kept, blocks, share, share)
        time = self._seconds(kept) / self._seconds({}) * blocks / self.blocks
        return Size(kept, blocks, share, time)

    def _removals(self, kept: Mapping[str, int]) -> list[tuple[Groups, int]]:
        return [(self.groups[kind], self.groups[kind].count - n) for kind, n in kept.items()]

    def _small_kind_counts(self) -> Iterator[dict[str, int]]:
        """All combinations of kinds with few groups; a reader loses groups of one kind at most."""
        others = [groups for kind, groups in self.automatic.items() if kind != self.largest]
        small = [groups for groups in others if groups.count < _FEW]
        counts = [_numbers(groups, groups.step) for groups in small]
        for chosen in product(*counts):
            pairs = zip(small, chosen, strict=True)
            reduced = [(groups, count) for groups, count in pairs if count < groups.count]
            readers = [reader for groups, _ in reduced for reader in groups.readers]
            kept = {groups.kind: count for groups, count in reduced}
            if len(set(readers)) == len(readers) and self._is_expressible(kept):
                yield kept

    @property
    def automatic(self) -> dict[str, Groups]:
        """The kinds that are reduced by default: those with readers, or all if none has readers."""
        if self._experts:
            return {kind: groups for kind, groups in self.groups.items() if groups.routed}
        with_readers = {kind: groups for kind, groups in self.groups.items() if groups.readers}
        return with_readers or self.groups

    @property
    def largest(self) -> str | None:
        """The kind with the most parameters."""
        kinds = self.automatic
        least = {kind: max(groups.least, groups.step) for kind, groups in kinds.items()}
        return min(kinds, key=lambda kind: self._parameters({kind: least[kind]}), default=None)

    def _completions(self, kept: dict[str, int], blocks: int, *, width: bool) -> Iterator[Size]:
        """The size with every number of groups of the largest kind."""
        yield self._size_of(kept, blocks)
        kind = self.largest if width else None
        if kind is None:
            return
        groups = self.groups[kind]
        many = self.multiple if groups.count >= _FEW else 1
        for number in _numbers(groups, lcm(groups.step, many)):
            if number < groups.count:
                yield self._size_of(kept | {kind: number}, blocks)

    def _is_expressible(self, kept: Mapping[str, int]) -> bool:
        """True if the configuration can express these numbers."""
        try:
            resized(self._config, self._removals(kept), range(self.blocks), self.blocks)
        except AptError:
            return False
        return True

    def _parameters(self, kept: Mapping[str, int]) -> int:
        """The number of parameters of all blocks with these numbers of groups."""
        return sum(n * self._parameters_of(kind, kept) for kind, n in self._kinds.items())

    def _parameters_of(self, kind: "_Kind", kept: Mapping[str, int]) -> int:
        relevant = tuple((g.kind, kept[g.kind]) for g in kind.groups if g.kind in kept)
        if (kind, relevant) not in self._counts:
            self._counts[kind, relevant] = kind.parameters(dict(relevant))
        return self._counts[kind, relevant]


def _numbers(groups: Groups, step: int) -> Iterator[int]:
    """The numbers of groups that can be kept, in multiples of ``step``."""
    return (number for number in range(step, groups.count + 1, step) if number >= groups.least)


@dataclass(frozen=True, eq=False)
class _Kind:
    """Blocks with the same groups and the same shapes of parameters."""

    shapes: tuple[tuple[str, torch.Size], ...]
    groups: tuple[Groups, ...]

    def parameters(self, kept: Mapping[str, int]) -> int:
        """The number of parameters of a block with ``kept`` groups."""
        removals = [(g, range(kept[g.kind], g.count)) for g in self.groups if g.kind in kept]
        empty = {path: torch.empty(shape, device="meta") for path, shape in self.shapes}
        return sum(tensor.numel() for tensor in without(empty, removals).values())


def _kinds(
    blocks: Sequence[tuple[str, nn.Module]], adapter: Adapter, config: Any
) -> dict[_Kind, int]:
    """The kinds of blocks, with the number of blocks of each."""
    kinds: dict[Any, tuple[_Kind, int]] = {}
    for _, block in blocks:
        shapes = tuple((path, p.shape) for path, p in block.named_parameters())
        key = (type(block), shapes)
        entry = kinds.get(key) or (_Kind(shapes, tuple(adapter.groups(block, config))), 0)
        kinds[key] = (entry[0], entry[1] + 1)
    return dict(kinds.values())
