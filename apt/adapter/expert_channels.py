"""The channels inside experts: each expert loses other channels, but all lose the same number."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import gcd
from typing import Any

from torch import Tensor, nn

from apt.adapter.groups import Groups, Part, tensors_of
from apt.adapter.sites import Site
from apt.adapter.text_config import text_config

# The fields of configurations for the width of an expert, in the order of preference.
_WIDTH_FIELDS = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")

_ALIGNMENT = 8  # grouped kernels of torch need rows of a multiple of 16 bytes: 8 values in bf16


def experts_width(block: nn.Module, sites: Iterable[Site], config: Any) -> tuple[str, int] | None:
    """The field of a configuration with the width of a block's experts, and its value.

    Returns:
        None without experts, or without such a field.
    """
    count, config = neurons(block, sites), text_config(config)
    fields = (name for name in _WIDTH_FIELDS if getattr(config, name, None) == count > 0)
    return next(((field, count) for field in fields), None)


def neurons(block: nn.Module, sites: Iterable[Site]) -> int:
    """The number of channels inside an expert of a block; 0 without experts."""
    widths = (site.oriented(site.weight(block)).shape[1] for site in _readers(sites))
    return next(widths, 0)


def expert_channels(
    block: nn.Module,
    sites: Sequence[Site],
    width: tuple[str, int],
    follow: Mapping[str, int],
    *,
    pairs: bool | None = None,
) -> Groups | None:
    """The channels of the experts of a block, as groups that are apart.

    Args:
        block: the block.
        sites: the sites of its experts, and the sites that read the channels of ``follow``.
        width: the field of the configuration, and its value, see `experts_width`.
        follow: other parameters whose size follows this field, such as the weights of a shared
            expert, with the dimension of that size.
        pairs: True if the rows of a gate and of the other weight alternate in a stack, False if
            all rows of the gate come first; None to ask the module, as in transformers 5.

    Returns:
        None if no site reads such channels, or if a parameter has another layout.
    """
    tensors, (field, count) = tensors_of(block), width
    readers, parts = [s for s in _readers(sites) if s.expert is not None], list[Part]()
    follow = {**_list_dims(tensors, sites), **follow}
    if readers:
        owner = block.get_submodule(readers[0].parameter.rpartition(".")[0])
        pairs = not getattr(owner, "is_concatenated", True) if pairs is None else pairs
        first_expert = [site for site in sites if site.expert == 0]
        parts += _stack_parts(tensors, first_expert, readers[0], count, pairs=pairs)
    listed = follow.keys() - {part.parameter for part in parts}
    for site in sites:
        if site.parameter in listed and follow[site.parameter] == int(not site.transposed):
            readers.append(site)
            parts += _list_parts(
                tensors, site, {path: follow[path] for path in sorted(listed)}, count
            )
    entries, dims = Counter[str](), {part.parameter: part.dim for part in parts}
    for part in parts:
        entries[part.parameter] += part.each * count
    complete = all(entries[path] == tensors[path].shape[dim] for path, dim in dims.items())
    if not readers or not complete or listed - dims.keys():
        return None
    names = tuple(site.name for site in readers)
    return Groups(
        "expert-channels", count, names, tuple(parts), {field: int},
        multiple=gcd(count, _ALIGNMENT), apart=True,
    )  # fmt: skip


def _readers(sites: Iterable[Site]) -> list[Site]:
    """The last weights of experts."""
    routed = [site for site in sites if site.routed]
    order = max((site.order for site in routed), default=0)
    return [site for site in routed if site.order == order]


def _list_dims(tensors: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, int]:
    """The parameters of experts in a ``ModuleList``, with the dimension of their channels."""
    last, dims = {site.parameter for site in _readers(sites)}, dict[str, int]()
    for site in (site for site in sites if site.routed and site.expert is None):
        rows = site.parameter not in last
        dims[site.parameter] = int(rows == site.transposed)
        if rows and (bias := f"{site.parameter.removesuffix('weight')}bias") in tensors:
            dims[bias] = 0
    return dims


def _stack_parts(
    tensors: Mapping[str, Tensor], first: Sequence[Site], last: Site, count: int, *, pairs: bool
) -> Iterator[Part]:
    """The parts in stacked parameters, from the sites of the first expert and its last site."""
    yield Part(last.parameter, 1 if last.transposed else 2)
    for site in first:
        if site.parameter == last.parameter:
            continue
        biases = [n for n, t in tensors.items() if n.startswith(site.parameter) and t.ndim == 2]
        for path, dim in [(site.parameter, 1 + site.transposed), *((bias, 1) for bias in biases)]:
            size = tensors[path].shape[dim]
            yield from [Part(path, dim, size // count)] if pairs else _rows(path, dim, size, count)


def _list_parts(
    tensors: Mapping[str, Tensor], reader: Site, follow: Mapping[str, int], count: int
) -> Iterator[Part]:
    """The parts of one expert in a list, or of a shared expert, which can be a multiple as wide."""
    owner = reader.parameter.rsplit(".", 2)[0]
    each = tensors[reader.parameter].shape[follow[reader.parameter]] // count
    for path, dim in follow.items():
        if path.rsplit(".", 2)[0] == owner:
            yield from _rows(path, dim, tensors[path].shape[dim], count, each, reader.name)


def _rows(
    path: str, dim: int, size: int, count: int, each: int = 1, reader: str = ""
) -> Iterator[Part]:
    """The parts of a parameter that has every channel once, or several times in succession."""
    for start in range(0, size, count * each):
        yield Part(path, dim, each, start, reader)
