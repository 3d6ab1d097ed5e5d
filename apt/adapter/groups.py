"""Groups: the entries of a block's parameters that can only be removed together."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter.sites import Site

_Q, _K, _V, _O = (f"self_attn.{name}_proj" for name in "qkvo")  # the Linears of LLaMA's attention


@dataclass(frozen=True)
class Part:
    """The entries of one parameter that belong to the groups.

    Group ``g`` has the entries ``start + g * each`` to ``start + (g + 1) * each - 1``.

    Args:
        parameter: the path within the block of the parameter, or of a buffer that is stored. An
            asterisk stands for the index of a group; then each group has a parameter of its own.
        dim: the dimension of the entries in the parameter.
        each: the number of consecutive entries of one group.
        start: the first entry of the first group.
        reader: for groups that are apart, the name of the site whose columns the entries belong to;
            empty for a stack, which has a slice for each expert.
    """

    parameter: str
    dim: int = 0
    each: int = 1
    start: int = 0
    reader: str = ""

    def path(self, group: int) -> str:
        """The path of the parameter for one group."""
        return self.parameter.replace("*", str(group))


@dataclass(frozen=True)
class Groups:
    """Groups of one kind in a block, such as the channels of an MLP or the heads of an attention.

    A model keeps the same number of groups of a kind in all blocks, since its configuration has one
    number for all. If the columns of the readers are zero for a group, the block's output does not
    depend on the group, and the group can be removed.

    Args:
        kind: the name for users, for instance ``"channels"``.
        count: the number of groups.
        readers: the names of the sites that multiply the outputs of the groups. A reader has the
            same number of consecutive columns for every group.
        parts: the entries of all parameters that belong to the groups, columns of readers included.
        fields: the fields of the configuration, with their values as functions of the number of
            groups that are kept.
        bins: the number of equal, consecutive bins of groups. Every bin must lose the same number
            of groups. Query heads that share a key/value head are a bin.
        least: the least number that a model can keep.
        outputs: for groups without readers, the entries that produce their outputs: if they are
            zero, the block's output does not depend on the group.
        routed: True if a router distributes the tokens among the groups. The router then chooses
            among the kept groups, so that a model without a group differs from a model in which the
            group's output is zero.
        members: the path of a list of modules, one for each group, from which the modules of
            removed groups are deleted; empty if the groups are only entries of parameters.
        multiple: the number of kept groups of a bin must be a multiple of this number.
        apart: True if every reader has channels of its own, as experts have. Each reader loses the
            same number of channels, but other ones. A column of a reader is a channel. The removed
            channels are moved behind the others, see `gather`, so that their positions are the same
            in all readers.
    """

    kind: str
    count: int
    readers: tuple[str, ...]
    parts: tuple[Part, ...]
    fields: Mapping[str, Callable[[int], int | float]]
    bins: int = 1
    least: int = 1
    outputs: tuple[Part, ...] = ()
    routed: bool = False
    members: str = ""
    multiple: int = 1
    apart: bool = False

    @property
    def step(self) -> int:
        """The step from one number of groups that a model can keep to the next."""
        return self.bins * self.multiple

    def columns_of(self, reader: str) -> int:
        """The number of columns of a reader; a shared expert can have several for each group."""
        return self.count * next((part.each for part in self.parts if part.reader == reader), 1)


def rows(block: nn.Module, linear: str, each: int = 1, start: int = 0) -> Iterator[Part]:
    """The rows of a Linear, and the entries of its bias if it has one."""
    yield Part(f"{linear}.weight", 0, each, start)
    if getattr(block.get_submodule(linear), "bias", None) is not None:
        yield Part(f"{linear}.bias", 0, each, start)


def columns(linear: str, each: int = 1) -> Part:
    """The columns of a Linear."""
    return Part(f"{linear}.weight", 1, each)


def entries(part: Part, group: int) -> slice:
    """The entries of one group in the dimension of a part."""
    first = part.start + group * part.each
    return slice(first, first + part.each)


def tensors_of(block: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a block by path, to which the parts of groups refer."""
    return dict(block.named_parameters()) | dict(block.named_buffers())


def disconnect(parameters: Mapping[str, Tensor], groups: Groups, removed: Sequence[int]) -> None:
    """Set the outputs of removed groups without readers to zero, in the parameters by path."""
    for part in groups.outputs:
        for group in removed:
            _output(parameters, part, group).zero_()


def disconnected(parameters: Mapping[str, Tensor], groups: Groups) -> Tensor:
    """The mask (count,) of the groups without readers whose outputs are all zero."""
    mask = torch.ones(groups.count, dtype=torch.bool)
    for part in groups.outputs:
        zero = [not _output(parameters, part, group).any() for group in range(groups.count)]
        mask &= torch.tensor(zero)
    return mask


def _output(parameters: Mapping[str, Tensor], part: Part, group: int) -> Tensor:
    """A view of the entries that produce the output of one group."""
    values = parameters[part.path(group)].detach()
    return values if "*" in part.parameter else values.movedim(part.dim, 0)[entries(part, group)]


def entries_of(
    parameters: Mapping[str, Tensor], groups: Groups, reader: Site
) -> Iterator[tuple[Part, Tensor]]:
    """The entries that belong to the columns of one reader, for groups that are apart.

    Yields:
        Each part, with a view (columns, entries, …) of its values.
    """
    width = reader.oriented(reader.slice_of(parameters[reader.parameter])).shape[1]
    for part in groups.parts:
        if part.reader not in ("", reader.name) or (not part.reader and reader.expert is None):
            continue
        tensor = parameters[part.parameter].movedim(part.dim, -1)
        if not part.reader:
            tensor = tensor[reader.expert]
        span = tensor.narrow(-1, part.start, groups.count * part.each)
        yield part, torch.unflatten(span, -1, (width, -1)).movedim((-2, -1), (0, 1)).detach()


def gather(parameters: Mapping[str, Tensor], groups: Groups, readers: Iterable[Site]) -> None:
    """Move the zero columns of each reader behind its other columns, with their entries.

    The block remains the same function, up to rounding.
    """
    for reader in readers:
        weight = reader.oriented(reader.slice_of(parameters[reader.parameter].detach()))
        order = (weight == 0).all(0).int().argsort(stable=True)
        for _, values in entries_of(parameters, groups, reader):
            values.copy_(values[order])


Removal = tuple[Groups, Sequence[int]]
"""Groups of one kind, and the indices of the removed groups."""


def without(parameters: Mapping[str, Tensor], removals: Sequence[Removal]) -> dict[str, Tensor]:
    """The parameters of a block by path, without some groups; changed parameters are copies.

    Parts of tensors that are not in ``parameters``, such as buffers, are ignored.
    """
    kept: dict[str, dict[int, Tensor]] = {}
    for groups, removed in removals:
        for part in (part for part in groups.parts if part.parameter in parameters):
            dims = kept.setdefault(part.parameter, {})
            length = parameters[part.parameter].shape[part.dim]
            mask = dims.setdefault(part.dim, torch.ones(length, dtype=torch.bool))
            first = part.start + part.each * torch.tensor([*removed], dtype=torch.long)
            mask[(first.unsqueeze(1) + torch.arange(part.each)).flatten()] = False
    smaller = dict(parameters)
    for path, dims in kept.items():
        smaller[path] = parameters[path].detach()
        for dim, mask in dims.items():
            indices = mask.nonzero().squeeze(1).to(smaller[path].device)
            smaller[path] = smaller[path].index_select(dim, indices)
    for groups, removed in removals:
        if groups.members:
            smaller = dict(_without_members(smaller, groups.members, removed))
    return smaller


def _without_members(
    parameters: Mapping[str, Tensor], members: str, removed: Sequence[int]
) -> Iterator[tuple[str, Tensor]]:
    """The parameters without some members of a list; later members get lower indices."""
    for path, tensor in parameters.items():
        index, _, name = path.removeprefix(f"{members}.").partition(".")
        if not path.startswith(f"{members}."):
            yield path, tensor
        elif int(index) not in removed:
            position = int(index) - sum(other < int(index) for other in removed)
            yield f"{members}.{position}.{name}", tensor


def mlp_channels(block: nn.Module, config: Any, mlp: str = "mlp") -> Groups:
    """The channels of a gated MLP with the Linears ``gate_proj``, ``up_proj`` and ``down_proj``.

    Args:
        block: the block.
        config: the configuration; its ``intermediate_size`` is the number of channels.
        mlp: the path of the MLP within the block.
    """
    down = f"{mlp}.down_proj"
    parts = [*rows(block, f"{mlp}.gate_proj"), *rows(block, f"{mlp}.up_proj"), columns(down)]
    fields = {"intermediate_size": int}
    return Groups("channels", config.intermediate_size, (down,), tuple(parts), fields)


def attention_heads(block: nn.Module, config: Any) -> list[Groups]:
    """The heads of ``self_attn``, with the Linears ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``.

    The configuration must have a field ``head_dim``.

    If several query heads share a key/value head, there are two kinds of groups: query heads, of
    which each key/value head loses the same number, and key/value heads with all their query heads.
    """
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None)
    size = head_dim or config.hidden_size // heads
    queries = heads // shared
    shared_parts = [
        *rows(block, _Q, queries * size),
        *rows(block, _K, size),
        *rows(block, _V, size),
        columns(_O, queries * size),
    ]
    unchanged = {} if head_dim else {"head_dim": lambda kept: size}  # Qwen2-MoE, Mistral before 5.0
    fields: dict[str, Callable[[int], int]] = {
        "num_attention_heads": lambda kept: kept * queries,
        "num_key_value_heads": int,
        **unchanged,
    }
    key_value_groups = Groups("key-value-heads", shared, (_O,), tuple(shared_parts), fields)
    if queries == 1:
        return [Groups("heads", heads, (_O,), tuple(shared_parts), fields)]
    parts = (*rows(block, _Q, size), columns(_O, size))
    return [
        Groups("heads", heads, (_O,), parts, {"num_attention_heads": int, **unchanged}, shared),
        key_value_groups,
    ]
