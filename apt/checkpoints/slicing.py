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
        rows: the kept rows of the source; None for all.
    """

    target: str
    source: str
    rows: Sequence[int] | None = None


class Slicing:
    """Makes `Slices` for a model from which experts and blocks are removed.

    Args:
        skeleton: the dense model without weights.
        stored: the checkpoint of the dense model.
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
        sources, rows = self._outside_blocks(kept), dict[str, Sequence[int]]()
        first_user = dict[str, int]()
        for new_index, index in enumerate(kept):
            for part in self.block(index, removed.get(plan.blocks[index].name, {}), new_index):
                shared = first_user.setdefault(part.source, index) != index
                if shared and (plan.dropped or part.rows is not None):
                    raise _unsliceable(part.source, "several blocks use it")
                sources[part.target] = part.source
                if part.rows is not None:
                    rows[part.target] = part.rows
        experts = {e.kept for b in plan.blocks for e in b.groups if e.groups.routed}
        order = {key: position for position, key in enumerate(self._stored.shards.entries)}
        sources = dict(sorted(sources.items(), key=lambda pair: order[pair[1]]))
        expert_count = experts.pop() if experts else None
        return Slices(config, sources, rows, kept, expert_count, values or {})

    def provisional(self, plan: Plan, *, rounded: bool) -> Slices:
        """Slices without the last experts of each block, for checks before experts are chosen.

        The checks depend on the number of removed experts, not on which ones they are.

        Args:
            rounded: True to give all tensors that the run may change new values on the meta device.
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

    def block(self, index: int, removed: Removed, new_index: int) -> Iterator[Sliced]:
        """The stored tensors of a block without some experts, which becomes block ``new_index``."""
        name, block = self._blocks[index]
        removals = removals_of(self._skeleton.adapter, self._skeleton.config, block, removed)
        for path in self._paths(index):
            pieces = self._stored.layout[f"{name}.{path}"]
            new_path = _path_after_removal(path, removals)
            if new_path is None:
                continue
            targets = self._stored.layout[f"{name}.{new_path}"]
            key_by_part = {_part_key(piece): piece.key for piece in targets}
            for piece, target in zip(pieces, targets, strict=True):
                cut = _cut(piece, path, block, removals)
                if cut is None:
                    continue
                remaining, rows = cut
                key = target.key if remaining == piece else key_by_part[_part_key(remaining)]
                yield Sliced(_renumbered(key, index, new_index), piece.key, rows)

    def changed(
        self, planned: PlannedBlock, module: nn.Module, removed: Removed
    ) -> Iterator[tuple[str, Tensor]]:
        """The stored tensors that differ from a pruned block: their names and new kept rows.

        Args:
            module: the pruned block, with its weights in memory.
            removed: the experts that the block loses.
        """
        index = [name for name, _ in self._blocks].index(planned.name)
        tensors, pieces = tensors_of(module), dict[str, list[tuple[Piece, Tensor]]]()
        for path in self._paths(index):
            for piece in self._stored.layout[f"{planned.name}.{path}"]:
                pieces.setdefault(piece.key, []).append((piece, tensors[path].detach()))
        for part in self.block(index, removed, index):
            before = self._stored.shards.read(part.source)
            after = before.clone()
            for piece, values in pieces[part.source]:
                after[piece.of] = piece.to_stored(values).to(after)
            if part.rows is not None:
                before, after = before[list(part.rows)], after[list(part.rows)]
            if not torch.equal(before, after):
                yield part.source, after

    def _paths(self, index: int) -> list[str]:
        """The paths of the parameters and buffers of a block that are stored."""
        name, block = self._blocks[index]
        return [path for path in tensors_of(block) if f"{name}.{path}" in self._stored.layout]

    def _outside_blocks(self, kept: Sequence[int]) -> dict[str, str]:
        """The stored tensors that belong to no parameter of a block, by their new names.

        An unused tensor under the name of a block is kept or removed with the block. Tensors of
        blocks that the model does not have are left out, such as those of a block that predicts
        further tokens.
        """
        in_blocks, prefixes = set[str](), set[str]()
        for index, (name, _) in enumerate(self._blocks):
            for path in self._paths(index):
                for piece in self._stored.layout[f"{name}.{path}"]:
                    in_blocks.add(piece.key)
                    if (parts := _split_at_number(piece.key, index)) is not None:
                        prefixes.add(parts[0])
        new_indices = {index: new_index for new_index, index in enumerate(kept)}
        others = dict[str, str]()
        numbered = re.compile(f"({'|'.join(map(re.escape, prefixes))})([0-9]+)[.]")
        for key in self._stored.shards.entries.keys() - in_blocks:
            match = numbered.match(key)
            if match is None:
                others[key] = key
            elif (block_index := int(match[2])) in new_indices:
                others[_renumbered(key, block_index, new_indices[block_index])] = key
        return others


def _cut(
    piece: Piece, path: str, block: nn.Module, removals: Sequence[Removal]
) -> tuple[Piece, Sequence[int] | None] | None:
    """A piece at its position after the removal, and its kept rows; None if it is removed."""
    rows: Sequence[int] | None = None
    for groups, removed in removals:
        for part in (part for part in groups.parts if part.parameter == path):
            size = tensors_of(block)[path].shape[part.dim]
            removed_rows = {row for group in removed for row in range(size)[entries(part, group)]}
            position = piece.part[part.dim] if piece.part else slice(0, size, 1)
            if isinstance(position, int):
                if position in removed_rows:
                    return None
                position -= sum(row < position for row in removed_rows)
                piece = replace(piece, part=_with_position(piece.part, part.dim, position))
            elif removed_rows and (
                piece.of or _stored_dim(piece, part.dim) or position != slice(0, size, 1)
            ):
                raise _unsliceable(piece.key, f"its {groups.kind} are not its rows")
            elif removed_rows:
                rows = [row for row in range(size) if row not in removed_rows]
    return piece, rows


def _stored_dim(piece: Piece, dim: int) -> int:
    """The dimension of a stored tensor that corresponds to a dimension of the parameter."""
    dropped = sum(isinstance(cut, int) for cut in piece.part[:dim])
    return piece.order[dim - dropped] if piece.order else dim - dropped


def _with_position(
    part: tuple[int | slice, ...], dim: int, position: int
) -> tuple[int | slice, ...]:
    return (*part[:dim], position, *part[dim + 1 :])


def _part_key(piece: Piece) -> tuple[object, ...]:
    """The part of a piece as a key of a mapping: slices have no hash before Python 3.12."""
    cuts = piece.part
    return tuple(cut if isinstance(cut, int) else (cut.start, cut.stop, cut.step) for cut in cuts)


def _path_after_removal(path: str, removals: Sequence[Removal]) -> str | None:
    """The path of a parameter after the removal of members of lists; None for a removed member."""
    for groups, removed in removals:
        if groups.members and path.startswith(f"{groups.members}."):
            index, _, rest = path.removeprefix(f"{groups.members}.").partition(".")
            if int(index) in removed:
                return None
            position = int(index) - sum(other < int(index) for other in removed)
            path = f"{groups.members}.{position}.{rest}"
    return path


def _split_at_number(key: str, index: int) -> tuple[str, str] | None:
    """The parts of a name before and after the first occurrence of a block's number.

    None if the name has no such number.
    """
    before, number, after = f".{key}".partition(f".{index}.")
    return (f"{before}."[1:], after) if number else None


def _renumbered(key: str, index: int, new_index: int) -> str:
    """The name of a tensor of block ``index`` after the block has become ``new_index``."""
    parts = _split_at_number(key, index)
    return key if parts is None else f"{parts[0]}{new_index}.{parts[1]}"


def _unsliceable(name: str, why: str) -> AptError:
    return AptError(
        f"{name} cannot be cut out of the stored bytes: {why}",
        "expand the model with apt-prune convert, and shrink the result",
    )
