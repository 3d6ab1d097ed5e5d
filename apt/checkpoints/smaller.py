"""A smaller model, in memory or on disk: the dense model without some groups and blocks."""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from apt.adapter import Adapter, Groups
from apt.adapter.groups import Removal, tensors_of, without
from apt.adapter.text_config import text_config
from apt.checkpoints.copies import copy_files, side_files
from apt.checkpoints.former_names import save_config
from apt.checkpoints.offload import StoredBlocks
from apt.checkpoints.opened import Opened
from apt.checkpoints.safetensors_io import Shards, write_files
from apt.checkpoints.skeletons import skeleton_of_class
from apt.errors import AptError, first_line
from apt.layouts.pieces import Layout, Piece
from apt.planning.plan import Plan
from apt.planning.structure import Removed, removed_groups

_PER_BLOCK = ("layer", "block", "idx")  # in the names of fields with values for each block
_FIRST = ("first_k_dense_replace", "num_dense_layers")  # the number of dense blocks at the start
_INDICES = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs")
"""Lists of the blocks of one kind, by their indices."""

_CYCLIC = ("block_types",)  # lists of kinds, repeated for all blocks


def shrunk(
    model: Any, adapter: Adapter, removed: Mapping[str, Removed], dropped: Collection[str] = ()
) -> Any:
    """A model of the same class without some groups and blocks; ``model`` does not change.

    Args:
        removed: the removed groups of each block, by the block's name.

    Returns:
        The smaller model, which plain transformers saves and opens.

    Raises:
        AptError: a block or a kind of groups does not exist, the numbers of kept groups differ
            between blocks, or the configuration cannot express the smaller model.
    """
    blocks = adapter.blocks(model)
    config = smaller_config(adapter, model.config, blocks, removed, dropped)
    prefixes = tuple(f"{name}." for name, _ in blocks)
    state = {n: tensor for n, tensor in model.state_dict().items() if not n.startswith(prefixes)}
    kept = ((name, block) for name, block in blocks if name not in dropped)
    for (target, _), (name, block) in zip(blocks, kept, strict=False):
        removals = removals_of(adapter, model.config, block, removed.get(name, {}))
        tensors = without(block.state_dict(), removals)
        state |= {f"{target}.{path}": tensor for path, tensor in tensors.items()}
    return _built(type(model), config, state, model)


def smaller(model: Any, adapter: Adapter, plan: Plan) -> Any:
    """The model without the groups and blocks that a run with ``plan`` has disconnected."""
    modules = dict(adapter.blocks(model))
    removed = {b.name: removed_groups(modules[b.name], b) for b in plan.blocks}
    return shrunk(model, adapter, removed, plan.dropped)


def smaller_skeleton(model: Any, adapter: Adapter, plan: Plan) -> Any:
    """A plan's smaller model without weights; raises `AptError` if none is possible."""
    config = copy.deepcopy(model.config)
    empty: Any = skeleton_of_class(type(model), config, config)
    removed = last_groups(plan)
    return shrunk(empty, adapter, removed, plan.dropped)


def check_writable(skeleton: Opened, plan: Plan, layout: Layout) -> None:
    """Raise if a parameter is a part of a stored tensor, or if a group lies in several pieces.

    Experts may be stored one by one: removed experts are not written. A gate and the weight joined
    with it may be stored apart: each of them has all channels.
    """
    ranges = dict[str, list[tuple[int, range]]]()
    for planned in plan.blocks:
        for groups in (entry.groups for entry in planned.groups):
            for part in groups.parts:
                interior = range(part.start + 1, part.start + groups.count * part.each)
                ranges.setdefault(f"{planned.name}.{part.parameter}", []).append(
                    (part.dim, interior)
                )
    for name, pieces in layout.items():
        cuts = (
            (piece.part[dim], interior)
            for piece in pieces
            if piece.part
            for dim, interior in ranges.get(name, ())
        )
        separable = all(
            isinstance(cut, int) or not {cut.start, cut.stop}.intersection(interior)
            for cut, interior in cuts
        )
        if any(piece.of for piece in pieces) or not separable:
            raise AptError(
                f"{name} is not stored as one tensor, and cannot be made smaller one by one",
                "do not stream",
                ("stream",),
            )


def _moved(piece: Piece, parameter: str, removals: Sequence[Removal]) -> Piece:
    """A piece of a parameter, at its position after the removal of groups."""

    def moved_end(dim: int, end: int) -> int:
        """The end of a piece; it never lies inside a group."""
        return end - sum(
            len(removed) * part.each
            for groups, removed in removals
            for part in groups.parts
            if part.parameter == parameter and part.dim == dim and part.start < end
        )

    part = (
        slice(moved_end(dim, cut.start), moved_end(dim, cut.stop), cut.step)
        if isinstance(cut, slice)
        else cut
        for dim, cut in enumerate(piece.part)
    )
    return replace(piece, part=tuple(part))


def write_smaller(
    skeleton: Opened, plan: Plan, masked: StoredBlocks, layout: Layout, source: Path, target: Path
) -> None:
    """Write the smaller model of a run that has set columns to zero.

    The blocks are read one by one. Each kept block is written to a separate file.

    Args:
        skeleton: the dense model without weights.
        masked: the blocks of ``source``.
        source: the checkpoint with zeros and with all blocks.
        target: an empty directory.
    """
    blocks = skeleton.adapter.blocks(skeleton.module)
    removed = last_groups(plan)
    config = smaller_config(skeleton.adapter, skeleton.config, blocks, removed, plan.dropped)
    copy_files(side_files(source), source, target)
    save_config(config, target)
    parts = _stored_parts(skeleton, plan, masked, layout, Shards(source))
    count = 1 + len(plan.blocks) - len(plan.dropped)
    write_files(target, ((part, {"format": "pt"}) for part in parts), count)


def _stored_parts(
    skeleton: Opened, plan: Plan, masked: StoredBlocks, layout: Layout, shards: Shards
) -> Iterator[dict[str, Tensor]]:
    """The tensors outside the blocks, and then the tensors of each kept block, by their keys."""
    block_keys = {
        piece.key
        for name, block in skeleton.adapter.blocks(skeleton.module)
        for path in tensors_of(block)
        for piece in layout.get(f"{name}.{path}", ())
    }
    yield {key: shards.read(key) for key in shards.entries if key not in block_keys}
    kept = (planned for planned in plan.blocks if not planned.dropped)
    for target, planned in zip(plan.blocks, kept, strict=False):
        tensors = {}
        with masked.open(planned.name) as block:
            removed = removed_groups(block, planned)
            removals = removals_of(skeleton.adapter, skeleton.config, block, removed)
            parameters = {
                p: t for p, t in tensors_of(block).items() if f"{planned.name}.{p}" in layout
            }
            for path, tensor in without(parameters, removals).items():
                dtype = shards.entries[layout[f"{planned.name}.{path}"][0].key].dtype
                values = tensor.detach().to("cpu", dtype)
                for stored in layout[f"{target.name}.{path}"]:
                    piece = _moved(stored, path, removals)
                    first = piece.part[0] if piece.part else 0
                    if not isinstance(first, int) or first < len(values):  # else a removed expert
                        tensors[piece.key] = piece.to_stored(values).contiguous()
        yield tensors


def last_groups(plan: Plan) -> dict[str, Removed]:
    """The last groups of each block, as many as a plan removes: only their number matters."""
    return {
        planned.name: {
            entry.groups.kind: range(entry.kept, entry.groups.count) for entry in planned.groups
        }
        for planned in plan.blocks
    }


def removals_of(adapter: Adapter, config: Any, block: nn.Module, removed: Removed) -> list[Removal]:
    """The groups of a block that lose some, with the indices that are removed."""
    groups_of_kind = {groups.kind: groups for groups in adapter.groups(block, config)}
    return [(groups_of_kind[kind], indices) for kind, indices in removed.items()]


def smaller_config(
    adapter: Adapter,
    config: Any,
    blocks: Sequence[tuple[str, nn.Module]],
    removed: Mapping[str, Removed],
    dropped: Collection[str],
) -> Any:
    """The configuration without some groups and blocks; see `shrunk` for the errors."""
    names = [name for name, _ in blocks]
    for name in [*removed, *dropped]:
        if name not in names:
            raise AptError(f"the model has no block {name}", f"names look like {names[0]}")
    sizes = dict[str, tuple[Groups, int]]()
    for name, block in blocks:
        if name not in dropped:
            _count_removed(sizes, name, adapter.groups(block, config), removed.get(name, {}))
    kept = [index for index, name in enumerate(names) if name not in dropped]
    if not kept:
        raise AptError("no block would be left", "keep more")
    return resized(config, sizes.values(), kept, len(names))


def _count_removed(
    sizes: dict[str, tuple[Groups, int]], block: str, present: Sequence[Groups], removed: Removed
) -> None:
    """Record the removed groups of a block; raise if the blocks before it lose another number."""
    kinds = [groups.kind for groups in present]
    for kind in removed:
        if kind not in kinds:
            available = ", ".join(kinds) or "no groups"
            raise AptError(f"{block} has no groups of kind '{kind}'", f"it has: {available}")
    for groups in present:
        count = len(removed.get(groups.kind, ()))
        _, count_before = sizes.setdefault(groups.kind, (groups, count))
        if count != count_before:
            raise AptError(
                f"{block} loses {count} {groups.kind}, and a block before it {count_before}"
            )


def resized(
    config: Any, sizes: Iterable[tuple[Groups, int]], blocks: Sequence[int], count: int
) -> Any:
    """A copy of a configuration for fewer groups and blocks.

    Args:
        config: the configuration; in a multimodal one, only the part for text changes.
        sizes: the groups of each kind, and the number of removed groups.
        blocks: the indices of the kept blocks, of ``count`` blocks.
    """
    text = text_config(config)
    record = text.to_dict()
    fields: dict[str, Any] = {
        field: value(groups.count - removed)
        for groups, removed in sizes
        if removed
        for field, value in groups.fields.items()
    }
    if len(blocks) < count:
        fields["num_hidden_layers"] = len(blocks)
        fields |= dict(_per_block(record, blocks, count))
    names = getattr(text, "attribute_map", {})
    record |= {names.get(field, field): value for field, value in fields.items()}
    if text is not config:
        part = next(name for name, value in vars(config).items() if value is text)
        record = config.to_dict() | {part: record}
    try:
        return type(config).from_dict(record)
    except Exception as error:  # validation of a configuration raises many types
        raise _inexpressible(type(config), first_line(error)) from error


def _per_block(
    record: Mapping[str, Any], blocks: Sequence[int], count: int
) -> Iterator[tuple[str, Any]]:
    """The fields with values for each block, with their values for the kept blocks.

    They are lists with one entry for each block, lists of indices of blocks, mappings by index,
    and numbers of dense blocks at the start.
    """
    for field, value in record.items():
        if field in _FIRST and isinstance(value, int):
            yield field, sum(index < value for index in blocks)
        if not any(word in field for word in _PER_BLOCK):
            continue
        if isinstance(value, list) and _are_indices(field, value, count):
            yield field, [place for place, index in enumerate(blocks) if index in value]
        elif isinstance(value, list) and value and field in _CYCLIC:
            yield field, [value[index % len(value)] for index in blocks]
        elif isinstance(value, list) and len(value) == count:
            yield field, [value[index] for index in blocks]
        elif isinstance(value, dict) and _are_indices(field, [*map(_index, value)], count):
            values = {_index(key): (type(key), each) for key, each in value.items()}
            kept = ((place, values[index]) for place, index in enumerate(blocks) if index in values)
            yield field, {kind(place): each for place, (kind, each) in kept}


def _are_indices(field: str, values: Sequence[Any], count: int) -> bool:
    """True for indices of blocks; a list of ``count`` numbers has a value for each block."""
    distinct = all(type(value) is int and 0 <= value < count for value in values)
    partial = len(values) < count or field in _INDICES
    return distinct and partial and 0 < len(values) == len(set(values))


def _index(key: Any) -> Any:
    """The key of a mapping as an index; JSON has keys of text."""
    return int(key) if isinstance(key, str) and key.isdecimal() else key


def _built(model_class: Any, config: Any, state: dict[str, Tensor], dense: Any) -> Any:
    """A model with this configuration and these tensors."""
    config.dtype = dense.dtype
    try:
        smaller_model: Any = skeleton_of_class(model_class, config, dense.config)
        loaded = smaller_model.load_state_dict(state, strict=False, assign=True)
    except Exception as error:  # a class may refuse a configuration in any way
        raise _inexpressible(model_class, first_line(error)) from error
    smaller_model.tie_weights()
    missing = set(loaded.missing_keys).intersection(
        name for name, _ in smaller_model.named_parameters()
    )
    if problems := [*loaded.unexpected_keys, *missing]:
        raise _inexpressible(model_class, f"{sorted(problems)[0]} does not fit")
    if getattr(dense, "generation_config", None) is not None:
        smaller_model.generation_config = copy.deepcopy(dense.generation_config)
    return smaller_model.to(dense.device).train(dense.training)


def _inexpressible(model_class: Any, reason: str) -> AptError:
    return AptError(f"{model_class.__name__} cannot express these sizes: {reason}")
