"""The tensors of a smaller model as parts of the stored tensors: whole tensors and whole rows."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from apt.adapter.groups import Removal, entries, tensors_of
from apt.checkpoints.opened import Opened
from apt.checkpoints.quantised import Slices
from apt.checkpoints.smaller import last_groups, removals_of, smaller_config
from apt.checkpoints.stored import Stored, pruned_tensors
from apt.errors import AptError
from apt.layouts.pieces import Piece
from apt.planning.plan import Plan, PlannedBlock
from apt.planning.structure import Removed


@dataclass(frozen=True)
class Sliced:
    """A stored tensor of a block of a smaller model.

    Attributes:
        target: its name in the smaller model.
        source: the name of the stored tensor that it is a part of.
        rows: the rows of the source that it has; None for all.
    """

    target: str
    source: str
    rows: Sequence[int] | None = None


class Slicing:
    """The tensors of a smaller model that lacks experts and blocks of a stored one.

    Args:
        skeleton: the dense model without weights.
        stored: its checkpoint.
    """

    def __init__(self, skeleton: Opened, stored: Stored) -> None:
        self._skeleton, self._stored = skeleton, stored
        self._blocks = skeleton.adapter.blocks(skeleton.module)

    def slices(
        self, plan: Plan, removed: Mapping[str, Removed], values: Mapping[str, Tensor] | None = None
    ) -> Slices:
        """The tensors of the smaller model of a plan, as slices of stored tensors.

        Args:
            removed: the experts that each block loses.
            values: new values of tensors of the smaller model.

        Raises:
            AptError: a tensor of several blocks would change, or experts are not whole rows.
        """
        skeleton, blocks = self._skeleton, self._blocks
        config = smaller_config(skeleton.adapter, skeleton.config, blocks, removed, plan.dropped)
        kept = [index for index, planned in enumerate(plan.blocks) if not planned.dropped]
        sources, rows = self._beside(kept), dict[str, Sequence[int]]()
        users = dict[str, int]()
        for place, index in enumerate(kept):
            for each in self.block(index, removed.get(plan.blocks[index].name, {}), place):
                shared = users.setdefault(each.source, index) != index
                if shared and (plan.dropped or each.rows is not None):
                    raise _not_sliced(each.source, "several blocks use it")
                sources[each.target] = each.source
                if each.rows is not None:
                    rows[each.target] = each.rows
        experts = {e.kept for b in plan.blocks for e in b.groups if e.groups.routed}
        order = {key: place for place, key in enumerate(self._stored.shards.entries)}
        sources = dict(sorted(sources.items(), key=lambda pair: order[pair[1]]))
        number = experts.pop() if experts else None
        return Slices(config, sources, rows, kept, number, values or {})

    def provisional(self, plan: Plan, *, rounded: bool) -> Slices:
        """The same for the last experts of each block: only their number matters.

        Args:
            rounded: True to have values on the meta device for all tensors that a run may change.
        """
        slices = self.slices(plan, last_groups(plan))
        if not rounded:
            return slices
        changed, tensors = {*pruned_tensors(plan, self._stored.layout)}, self._stored.shards.entries
        values = {
            target: torch.empty(
                len(slices.rows[target]) if target in slices.rows else tensors[source].shape[0],
                *tensors[source].shape[1:],
                device="meta",
            )
            for target, source in slices.sources.items()
            if source in changed
        }
        return replace(slices, values=values)

    def block(self, index: int, removed: Removed, place: int) -> Iterator[Sliced]:
        """The stored tensors of a block without some experts, which becomes block ``place``."""
        name, block = self._blocks[index]
        removals = removals_of(self._skeleton.adapter, self._skeleton.config, block, removed)
        for path in self._paths(index):
            pieces, moved = self._stored.layout[f"{name}.{path}"], _moved_member(path, removals)
            if moved is None:
                continue
            targets = self._stored.layout[f"{name}.{moved}"]
            by_part = {_hashable(piece): piece.key for piece in targets}
            for piece, target in zip(pieces, targets, strict=True):
                cut = _cut(piece, path, block, removals)
                if cut is None:
                    continue
                rest, rows = cut
                key = target.key if rest == piece else by_part[_hashable(rest)]
                yield Sliced(_renumbered(key, index, place), piece.key, rows)

    def changed(
        self, planned: PlannedBlock, module: nn.Module, removed: Removed
    ) -> Iterator[tuple[str, Tensor]]:
        """The stored tensors whose kept rows have other values in an open block, with these rows.

        Args:
            module: the block.
            removed: the experts that it loses.
        """
        index = [name for name, _ in self._blocks].index(planned.name)
        tensors, pieces = tensors_of(module), dict[str, list[tuple[Piece, Tensor]]]()
        for path in self._paths(index):
            for piece in self._stored.layout[f"{planned.name}.{path}"]:
                pieces.setdefault(piece.key, []).append((piece, tensors[path].detach()))
        for each in self.block(index, removed, index):
            dense = self._stored.shards.read(each.source)
            now = dense.clone()
            for piece, values in pieces[each.source]:
                now[piece.of] = piece.to_stored(values).to(now)
            if each.rows is not None:
                dense, now = dense[list(each.rows)], now[list(each.rows)]
            if not torch.equal(dense, now):
                yield each.source, now

    def _paths(self, index: int) -> list[str]:
        """The parameters and buffers of a block that are stored."""
        name, block = self._blocks[index]
        return [path for path in tensors_of(block) if f"{name}.{path}" in self._stored.layout]

    def _beside(self, kept: Sequence[int]) -> dict[str, str]:
        """The stored tensors that are no parameter of a block.

        Unused tensors under the name of a block are kept or removed with the block. Tensors of a
        block that the model does not have, such as a block that predicts further tokens, are left
        out.
        """
        inside, before = set[str](), set[str]()
        for index, (name, _) in enumerate(self._blocks):
            for path in self._paths(index):
                for piece in self._stored.layout[f"{name}.{path}"]:
                    inside.add(piece.key)
                    if (parts := _split(piece.key, index)) is not None:
                        before.add(parts[0])
        places, beside = {index: place for place, index in enumerate(kept)}, dict[str, str]()
        numbered = re.compile(f"({'|'.join(map(re.escape, before))})([0-9]+)[.]")
        for key in self._stored.shards.entries.keys() - inside:
            match = numbered.match(key)
            if match is None:
                beside[key] = key
            elif (owner := int(match[2])) in places:
                beside[_renumbered(key, owner, places[owner])] = key
        return beside


def _cut(
    piece: Piece, path: str, block: nn.Module, removals: Sequence[Removal]
) -> tuple[Piece, Sequence[int] | None] | None:
    """A piece at its position without some experts, with its kept rows; None if it is removed."""
    rows: Sequence[int] | None = None
    for groups, removed in removals:
        for part in (part for part in groups.parts if part.parameter == path):
            size = tensors_of(block)[path].shape[part.dim]
            gone = {row for group in removed for row in range(size)[entries(part, group)]}
            place = piece.part[part.dim] if piece.part else slice(0, size, 1)
            if isinstance(place, int):
                if place in gone:
                    return None
                place -= sum(row < place for row in gone)
                piece = replace(piece, part=_with(piece.part, part.dim, place))
            elif gone and (piece.of or _stored_dim(piece, part.dim) or place != slice(0, size, 1)):
                raise _not_sliced(piece.key, f"its {groups.kind} are not its rows")
            elif gone:
                rows = [row for row in range(size) if row not in gone]
    return piece, rows


def _stored_dim(piece: Piece, dim: int) -> int:
    """The dimension of a stored tensor that is a dimension of the parameter."""
    before = sum(isinstance(cut, int) for cut in piece.part[:dim])
    return piece.order[dim - before] if piece.order else dim - before


def _with(part: tuple[int | slice, ...], dim: int, place: int) -> tuple[int | slice, ...]:
    return (*part[:dim], place, *part[dim + 1 :])


def _hashable(piece: Piece) -> tuple[object, ...]:
    """The part of a piece: a slice has a hash only from Python 3.12 on."""
    cuts = piece.part
    return tuple(cut if isinstance(cut, int) else (cut.start, cut.stop, cut.step) for cut in cuts)


def _moved_member(path: str, removals: Sequence[Removal]) -> str | None:
    """The path of a parameter without some members of a list; None if a removed member has it."""
    for groups, removed in removals:
        if groups.members and path.startswith(f"{groups.members}."):
            index, _, rest = path.removeprefix(f"{groups.members}.").partition(".")
            if int(index) in removed:
                return None
            place = int(index) - sum(other < int(index) for other in removed)
            path = f"{groups.members}.{place}.{rest}"
    return path


def _split(key: str, index: int) -> tuple[str, str] | None:
    """The parts of a name before and after the first occurrence of a block's number.

    None if the name has no such number.
    """
    before, number, after = f".{key}".partition(f".{index}.")
    return (f"{before}."[1:], after) if number else None


def _renumbered(key: str, index: int, place: int) -> str:
    """The name of a tensor of block ``index`` as one of block ``place``."""
    parts = _split(key, index)
    return key if parts is None else f"{parts[0]}{place}.{parts[1]}"


def _not_sliced(name: str, why: str) -> AptError:
    return AptError(
        f"{name} cannot be cut out of the stored bytes: {why}",
        "expand the model with apt-prune convert, and shrink the result",
    )
