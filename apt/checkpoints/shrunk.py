"""A smaller model: the dense model without some groups and blocks, with its configuration."""

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from apt.adapter import Adapter, Groups
from apt.adapter.groups import without
from apt.checkpoints.empty_model import empty_of_class
from apt.errors import AptError, first_line
from apt.planning.plan import Plan
from apt.planning.structure import planned_groups, removed_groups

Removed = Mapping[str, Sequence[int]]
"""The indices of the groups that are removed from a block, by kind."""

_PER_BLOCK = ("layer", "block")  # in the names of a configuration's lists with one entry a block


def shrunk(
    model: Any,
    adapter: Adapter,
    removed: Mapping[str, Removed],
    dropped: Collection[str] = (),
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
    names = [name for name, _ in blocks]
    for name in [*removed, *dropped]:
        if name not in names:
            raise AptError(f"the model has no block {name}", f"names look like {names[0]}")
    kept = [(name, block) for name, block in blocks if name not in dropped]
    if not kept:
        raise AptError("no block would be left", "keep more")
    inside = tuple(f"{name}." for name in names)
    state = {n: tensor for n, tensor in model.state_dict().items() if not n.startswith(inside)}
    sizes = dict[str, tuple[Groups, int]]()
    for new, (name, block) in zip(names, kept, strict=False):
        smaller = _smaller(adapter, model.config, name, block, removed.get(name, {}), sizes)
        state |= {f"{new}.{path}": tensor for path, tensor in smaller.items()}
    indices = [index for index, name in enumerate(names) if name not in dropped]
    config = resized(model.config, list(sizes.values()), indices, len(names))
    return _built(type(model), config, state, model)


def smaller(model: Any, adapter: Adapter, plan: Plan) -> Any:
    """The model without the groups and blocks that a run with ``plan`` has disconnected."""
    config, modules = model.config, dict(adapter.blocks(model))
    return shrunk(
        model,
        adapter,
        {b.name: removed_groups(adapter, config, modules[b.name], b) for b in plan.blocks},
        [block.name for block in plan.blocks if block.dropped],
    )


def empty_smaller(model: Any, adapter: Adapter, plan: Plan) -> Any:
    """The smaller model of a plan without weights.

    The shapes do not depend on the choice of the groups, so the last ones are removed here, from an
    empty copy of the model.

    Args:
        model: the model; it may be on the meta device.

    Raises:
        AptError: transformers has no model of these sizes.
    """
    config = copy.deepcopy(model.config)
    empty: Any = empty_of_class(type(model), config, config)
    modules, removed = dict(adapter.blocks(empty)), dict[str, Removed]()
    for block in plan.blocks:
        if not block.dropped:
            kept = planned_groups(adapter, config, modules[block.name], block)
            known = adapter.groups(modules[block.name], config)
            removed[block.name] = {g.kind: range(kept.get(g.kind, g.count), g.count) for g in known}
    dropped = [block.name for block in plan.blocks if block.dropped]
    return shrunk(empty, adapter, removed, dropped)


def _smaller(
    adapter: Adapter,
    config: Any,
    name: str,
    block: nn.Module,
    wanted: Removed,
    sizes: dict[str, tuple[Groups, int]],
) -> dict[str, Tensor]:
    """The tensors of a block without the removed groups; ``sizes`` are those of all blocks."""
    known = {groups.kind: groups for groups in adapter.groups(block, config)}
    for kind in wanted:
        if kind not in known:
            has = ", ".join(known) or "no groups"
            raise AptError(f"{name} has no groups of kind '{kind}'", f"it has: {has}")
    for groups in known.values():
        _agree(sizes, groups, len(wanted.get(groups.kind, ())), name)
    removals = [(known[kind], indices) for kind, indices in wanted.items()]
    return dict(block.state_dict()) | without(dict(block.named_parameters()), removals)


def resized(
    config: Any, sizes: Sequence[tuple[Groups, int]], blocks: Sequence[int], count: int
) -> Any:
    """A copy of a configuration for fewer groups and blocks.

    Args:
        sizes: the groups of each kind, and the number that is removed.
        blocks: the indices of the blocks that are kept.
    """
    record = config.to_dict()
    changed: dict[str, Any] = {
        field: value(groups.count - removed)
        for groups, removed in sizes
        if removed
        for field, value in groups.fields.items()
    }
    if len(blocks) < count:
        changed["num_hidden_layers"] = len(blocks)
        for field, value in record.items():
            named = any(word in field for word in _PER_BLOCK)
            if named and isinstance(value, list) and len(value) == count:
                changed[field] = [value[index] for index in blocks]
    renamed = getattr(config, "attribute_map", {})
    record |= {renamed.get(field, field): value for field, value in changed.items()}
    try:
        return type(config).from_dict(record)
    except Exception as error:  # validation of a configuration raises many types
        raise _inexpressible(type(config), first_line(error)) from error


def _agree(sizes: dict[str, tuple[Groups, int]], groups: Groups, count: int, block: str) -> None:
    """Raise if an earlier block loses another number of groups of this kind."""
    _, first = sizes.setdefault(groups.kind, (groups, count))
    if count != first:
        raise AptError(f"{block} loses {count} {groups.kind}, and a block before it {first}")


def _built(kind: Any, config: Any, state: dict[str, Tensor], model: Any) -> Any:
    """A model with this configuration and these tensors."""
    config.dtype = model.dtype
    try:
        built: Any = empty_of_class(kind, config, model.config)
        found = built.load_state_dict(state, strict=False, assign=True)
    except Exception as error:  # a class may refuse a configuration in any way
        raise _inexpressible(kind, first_line(error)) from error
    built.tie_weights()
    missing = set(found.missing_keys).intersection(name for name, _ in built.named_parameters())
    if wrong := [*found.unexpected_keys, *missing]:
        raise _inexpressible(kind, f"{sorted(wrong)[0]} does not fit")
    if getattr(model, "generation_config", None) is not None:
        built.generation_config = copy.deepcopy(model.generation_config)
    return built.to(model.device).train(model.training)


def _inexpressible(kind: Any, reason: str) -> AptError:
    return AptError(f"{kind.__name__} cannot express these sizes: {reason}")
