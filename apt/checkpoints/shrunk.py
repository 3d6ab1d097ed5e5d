"""A smaller model: the dense model without groups, with a configuration that says so."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from apt.adapter import Adapter, Groups
from apt.adapter.groups import without
from apt.errors import AptError, first_line

Removed = Mapping[str, Sequence[int]]
"""The indices of the groups that are removed from a block, by kind."""


def shrunk(model: Any, adapter: Adapter, removed: Mapping[str, Removed]) -> Any:
    """A model of the same class without some groups; the given model does not change.

    Args:
        model: a causal language model of transformers.
        adapter: the adapter of its family.
        removed: the removed groups of each block, by the block's name.

    Returns:
        The smaller model, which plain transformers saves and opens.

    Raises:
        AptError: the blocks do not keep the same number of groups, or the configuration cannot
            express the smaller model.
    """
    state, sizes = dict(model.state_dict()), dict[str, tuple[Groups, int]]()
    for name, block in adapter.blocks(model):
        wanted = removed.get(name, {})
        known = {groups.kind: groups for groups in adapter.groups(block, model.config)}
        for groups in known.values():
            _agree(sizes, groups, len(wanted.get(groups.kind, ())), name)
        removals = [(known[kind], indices) for kind, indices in wanted.items()]
        smaller = without(dict(block.named_parameters()), removals)
        state |= {f"{name}.{path}": tensor for path, tensor in smaller.items()}
    config = resized(model.config, list(sizes.values()))
    return _built(type(model), config, state, model)


def resized(config: Any, sizes: Sequence[tuple[Groups, int]]) -> Any:
    """A copy of a configuration for a smaller number of groups.

    Args:
        config: the configuration.
        sizes: the groups of each kind, and the number that is removed.
    """
    config = copy.deepcopy(config)
    for groups, removed in sizes:
        if removed:
            for name, value in groups.fields.items():
                setattr(config, name, value(groups.count - removed))
    return config


def _agree(sizes: dict[str, tuple[Groups, int]], groups: Groups, count: int, block: str) -> None:
    """Raise if an earlier block loses another number of groups of this kind."""
    _, first = sizes.setdefault(groups.kind, (groups, count))
    if count != first:
        raise AptError(f"{block} loses {count} {groups.kind}, and a block before it {first}")


def _built(kind: Any, config: Any, state: dict[str, torch.Tensor], model: Any) -> Any:
    """A model with this configuration and these tensors."""
    try:
        config = type(config).from_dict(config.to_dict())  # as it will be read from a file
        built, info = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=model.dtype, output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below
        )  # fmt: skip
    except Exception as error:  # validation of a configuration raises many types
        raise _inexpressible(kind, first_line(error)) from error
    for problem in ("mismatched_keys", "unexpected_keys"):
        if info[problem]:
            raise _inexpressible(kind, f"{sorted(map(str, info[problem]))[0]} does not fit")
    return built.to(model.device).train(model.training)


def _inexpressible(kind: Any, reason: str) -> AptError:
    return AptError(f"{kind.__name__} has no configuration for these widths: {reason}")
