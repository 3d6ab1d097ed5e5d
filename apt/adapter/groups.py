"""Groups: the entries of a block's parameters that can only be removed together."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """The entries of one parameter that belong to the groups.

    Group ``g`` has the entries ``start + g * each`` to ``start + (g + 1) * each - 1``.

    Args:
        parameter: the path of the parameter within the block.
        dim: the dimension of the parameter in which the entries are.
        each: the number of consecutive entries of one group.
        start: the first entry of the first group.
    """

    parameter: str
    dim: int = 0
    each: int = 1
    start: int = 0


@dataclass(frozen=True)
class Groups:
    """Groups of one kind in a block, such as the channels of an MLP or the heads of an attention.

    A model keeps the same number of groups of a kind in all blocks, since its configuration has one
    number for all. If the columns of the readers are zero for a group, the block's output does not
    depend on the group, and the group can be removed.

    Args:
        kind: the name for users, for instance ``"channels"``.
        count: the number of groups.
        readers: the names of the sites that multiply the outputs of the groups. Each has the same
            number of consecutive columns for every group.
        parts: the entries of all parameters that belong to the groups, columns of readers included.
        fields: the fields of the configuration, with their values as functions of the number of
            groups that are kept.
        bins: the number of equal, consecutive bins of groups. The same number must go from each:
            query heads that share a key/value head are a bin.
    """

    kind: str
    count: int
    readers: tuple[str, ...]
    parts: tuple[Part, ...]
    fields: Mapping[str, Callable[[int], int | float]]
    bins: int = 1


def rows(block: nn.Module, linear: str, each: int = 1, start: int = 0) -> Iterator[Part]:
    """The rows of a Linear, and the entries of its bias if it has one."""
    yield Part(f"{linear}.weight", 0, each, start)
    if getattr(block.get_submodule(linear), "bias", None) is not None:
        yield Part(f"{linear}.bias", 0, each, start)


def columns(linear: str, each: int = 1) -> Part:
    """The columns of a Linear."""
    return Part(f"{linear}.weight", 1, each)


Removal = tuple[Groups, Sequence[int]]
"""Groups of one kind, and the indices of those that are removed."""


def without(parameters: Mapping[str, Tensor], removals: Sequence[Removal]) -> dict[str, Tensor]:
    """The parameters of a block without the removed groups.

    Args:
        parameters: the parameters of the block by their paths within it.
        removals: the removed groups of each kind. Kinds may have entries in common.

    Returns:
        Smaller copies of the parameters that change, by path.
    """
    kept: dict[str, dict[int, Tensor]] = {}
    for groups, removed in removals:
        for part in groups.parts:
            dims = kept.setdefault(part.parameter, {})
            length = parameters[part.parameter].shape[part.dim]
            mask = dims.setdefault(part.dim, torch.ones(length, dtype=torch.bool))
            for group in removed:
                first = part.start + group * part.each
                mask[first : first + part.each] = False
    smaller = {}
    for path, dims in kept.items():
        smaller[path] = parameters[path].detach()
        for dim, mask in dims.items():
            indices = mask.nonzero().squeeze(1).to(smaller[path].device)
            smaller[path] = smaller[path].index_select(dim, indices)
    return smaller
