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

_PER_BLOCK = ("layer", "block", "idx")  # in the names of fields that go by block
_FIRST = ("first_k_dense_replace", "num_dense_layers")  # numbers of first blocks of one kind
_INDICES = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs")
"""Lists of the blocks of one kind, by their indices."""

_CYCLIC = ("block_types",)  # lists of kinds that begin again where they end


def shrunk(
    model: Any, adapter: Adapter, removed: Mapping[str, Removed], dropped: Collection[str] = ()
) -> Any:
    """A model of the same class without some groups and blocks; the given model does not change.

    Args:
        removed: the removed groups of each block, by the block's name.

    Returns:
        The smaller model, which plain transformers saves and opens.

    Raises:
        AptError: a block or a kind of groups does not exist, the blocks do not keep the same number
            of groups, or the configuration cannot express the smaller model.
    """
    blocks = adapter.blocks(model)
    config = _smaller_config(adapter, model.config, blocks, removed, dropped)
    inside = tuple(f"{name}." for name, _ in blocks)
    state = {n: tensor for n, tensor in model.state_dict().items() if not n.startswith(inside)}
    kept = ((name, block) for name, block in blocks if name not in dropped)
    for (place, _), (name, block) in zip(blocks, kept, strict=False):
        removals = _removals(adapter, model.config, block, removed.get(name, {}))
        own = without(block.state_dict(), removals)
        state |= {f"{place}.{path}": tensor for path, tensor in own.items()}
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
    removed = _last_groups(plan)
    return shrunk(empty, adapter, removed, plan.dropped)


def check_writable(skeleton: Opened, plan: Plan, layout: Layout) -> None:
    """Raise if a parameter is a part of a stored tensor, or if what is removed is cut into pieces.

    Experts may be stored one by one: those that are removed are not written. A gate may be stored
    beside the weight that it is joined with: each has all channels.
    """
    parts = dict[str, list[tuple[int, range]]]()
    for planned in plan.blocks:
        for groups in (entry.groups for entry in planned.groups):
            for part in groups.parts:
                inside = range(part.start + 1, part.start + groups.count * part.each)
                parts.setdefault(f"{planned.name}.{part.parameter}", []).append((part.dim, inside))
    for name, pieces in layout.items():
        cuts = (
            (piece.part[dim], inside)
            for piece in pieces
            if piece.part
            for dim, inside in parts.get(name, ())
        )
        whole = all(
            isinstance(cut, int) or not {cut.start, cut.stop}.intersection(inside)
            for cut, inside in cuts
        )
        if any(piece.of for piece in pieces) or not whole:
            raise AptError(
                f"{name} is not stored as one tensor, and cannot be made smaller one by one",
                "do not stream",
                ("stream",),
            )


def _moved(piece: Piece, parameter: str, removals: Sequence[Removal]) -> Piece:
    """A piece of a parameter, in the one without some groups."""

    def place(dim: int, end: int) -> int:
        """The end of a piece, which is not within the entries of groups."""
        return end - sum(
            len(removed) * part.each
            for groups, removed in removals
            for part in groups.parts
            if part.parameter == parameter and part.dim == dim and part.start < end
        )

    part = (
        slice(place(dim, cut.start), place(dim, cut.stop), cut.step)
        if isinstance(cut, slice)
        else cut
        for dim, cut in enumerate(piece.part)
    )
    return replace(piece, part=tuple(part))


def write_smaller(
    skeleton: Opened, plan: Plan, masked: StoredBlocks, layout: Layout, source: Path, target: Path
) -> None:
    """Write the smaller model of a run that has set columns to zero.

    The blocks are read one by one. Each block that is kept has a file of its own.

    Args:
        skeleton: the dense model without weights.
        masked: the blocks of ``source``.
        source: the checkpoint with zeros, which has all blocks.
        target: an empty directory.
    """
    blocks = skeleton.adapter.blocks(skeleton.module)
    removed = _last_groups(plan)
    config = _smaller_config(skeleton.adapter, skeleton.config, blocks, removed, plan.dropped)
    copy_files(side_files(source), source, target)
    save_config(config, target)
    parts = _stored_parts(skeleton, plan, masked, layout, Shards(source))
    count = 1 + len(plan.blocks) - len(plan.dropped)
    write_files(target, ((part, {"format": "pt"}) for part in parts), count)


def _stored_parts(
    skeleton: Opened, plan: Plan, masked: StoredBlocks, layout: Layout, shards: Shards
) -> Iterator[dict[str, Tensor]]:
    """The tensors outside the blocks, and then those of each block that is kept, by their keys."""
    inside = {
        piece.key
        for name, block in skeleton.adapter.blocks(skeleton.module)
        for path in tensors_of(block)
        for piece in layout.get(f"{name}.{path}", ())
    }
    yield {key: shards.read(key) for key in shards.entries if key not in inside}
    kept = (planned for planned in plan.blocks if not planned.dropped)
    for place, planned in zip(plan.blocks, kept, strict=False):
        tensors = {}
        with masked.open(planned.name) as block:
            removed = removed_groups(block, planned)
            removals = _removals(skeleton.adapter, skeleton.config, block, removed)
            own = {p: t for p, t in tensors_of(block).items() if f"{planned.name}.{p}" in layout}
            for path, tensor in without(own, removals).items():
                dtype = shards.entries[layout[f"{planned.name}.{path}"][0].key].dtype
                whole = tensor.detach().to("cpu", dtype)
                for stored in layout[f"{place.name}.{path}"]:
                    piece = _moved(stored, path, removals)
                    first = piece.part[0] if piece.part else 0
                    if not isinstance(first, int) or first < len(whole):  # experts that are left
                        tensors[piece.key] = piece.given(whole).contiguous()
        yield tensors


def _last_groups(plan: Plan) -> dict[str, Removed]:
    """The last groups of each block, as many as a plan removes: shapes depend on the numbers."""
    return {
        planned.name: {
            entry.groups.kind: range(entry.kept, entry.groups.count) for entry in planned.groups
        }
        for planned in plan.blocks
    }


def _removals(adapter: Adapter, config: Any, block: nn.Module, removed: Removed) -> list[Removal]:
    known = {groups.kind: groups for groups in adapter.groups(block, config)}
    return [(known[kind], indices) for kind, indices in removed.items()]


def _smaller_config(
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
    sizes: dict[str, tuple[Groups, int]], block: str, known: Sequence[Groups], removed: Removed
) -> None:
    """Add the numbers of a block to those of the blocks before it, which must be the same."""
    kinds = [groups.kind for groups in known]
    for kind in removed:
        if kind not in kinds:
            has = ", ".join(kinds) or "no groups"
            raise AptError(f"{block} has no groups of kind '{kind}'", f"it has: {has}")
    for groups in known:
        count = len(removed.get(groups.kind, ()))
        _, first = sizes.setdefault(groups.kind, (groups, count))
        if count != first:
            raise AptError(f"{block} loses {count} {groups.kind}, and a block before it {first}")


def resized(
    config: Any, sizes: Iterable[tuple[Groups, int]], blocks: Sequence[int], count: int
) -> Any:
    """A copy of a configuration for fewer groups and blocks.

    Args:
        config: the configuration; if it is a multimodal one, its part for text is changed.
        sizes: the groups of each kind, and the number that is removed.
        blocks: the indices of the blocks that are kept, of ``count`` blocks.
    """
    text = text_config(config)
    record = text.to_dict()
    changed: dict[str, Any] = {
        field: value(groups.count - removed)
        for groups, removed in sizes
        if removed
        for field, value in groups.fields.items()
    }
    if len(blocks) < count:
        changed["num_hidden_layers"] = len(blocks)
        changed |= dict(_per_block(record, blocks, count))
    renamed = getattr(text, "attribute_map", {})
    record |= {renamed.get(field, field): value for field, value in changed.items()}
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
    """The fields of a configuration that go by block, with their values for the kept blocks.

    They are lists with one entry a block, lists of the indices of some blocks, mappings by index,
    and numbers of the first blocks that are of one kind.
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
            known = {_index(key): (type(key), each) for key, each in value.items()}
            kept = ((place, known[index]) for place, index in enumerate(blocks) if index in known)
            yield field, {kind(place): each for place, (kind, each) in kept}


def _are_indices(field: str, values: Sequence[Any], count: int) -> bool:
    """True for the indices of some blocks; a list of ``count`` numbers has one for each block."""
    distinct = all(type(value) is int and 0 <= value < count for value in values)
    few = len(values) < count or field in _INDICES
    return distinct and few and 0 < len(values) == len(set(values))


def _index(key: Any) -> Any:
    """The index that is the key of a mapping, which JSON writes as text."""
    return int(key) if isinstance(key, str) and key.isdecimal() else key


def _built(kind: Any, config: Any, state: dict[str, Tensor], model: Any) -> Any:
    """A model with this configuration and these tensors."""
    config.dtype = model.dtype
    try:
        built: Any = skeleton_of_class(kind, config, model.config)
        loaded = built.load_state_dict(state, strict=False, assign=True)
    except Exception as error:  # a class may refuse a configuration in any way
        raise _inexpressible(kind, first_line(error)) from error
    built.tie_weights()
    missing = set(loaded.missing_keys).intersection(name for name, _ in built.named_parameters())
    if wrong := [*loaded.unexpected_keys, *missing]:
        raise _inexpressible(kind, f"{sorted(wrong)[0]} does not fit")
    if getattr(model, "generation_config", None) is not None:
        built.generation_config = copy.deepcopy(model.generation_config)
    return built.to(model.device).train(model.training)


def _inexpressible(kind: Any, reason: str) -> AptError:
    return AptError(f"{kind.__name__} cannot express these sizes: {reason}")
