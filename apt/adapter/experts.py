"""Experts: weights among which a router selects a few for each token."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn

from apt.adapter.expert_channels import expert_channels, experts_width
from apt.adapter.groups import Groups, Part, tensors_of
from apt.adapter.sites import Site
from apt.adapter.text_config import text_config
from apt.field_types import check_fields

# The fields of configurations for the number of experts, and for the number that a router picks.
_COUNT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_PICKED_FIELDS = (
    "num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts", "moe_k",
    "num_experts_per_token",
)  # fmt: skip


@dataclass(frozen=True)
class Experts:
    """The routed experts of a block, for `DecoderAdapter.experts`.

    Their weights are the slices of stacked parameters (experts, …), as in transformers 5, or the
    weights of the members of a ``ModuleList``, as in earlier releases. Linears beside them, such as
    a shared expert, are declared like any other Linear.

    Args:
        path: the path within the block of the module that owns the experts.
        router: the path within the block of the router, which stays dense.
        stacked: the names of the stacked parameters, in the order in which they are multiplied.
        linears: the names of the Linears of one member of a ``ModuleList``, in the order in which
            they are multiplied; the Linears of one tuple share their input.
        transposed: True if the slices of the stacked parameters are stored (in, out).
        shared: the path within the block of a shared expert with Linears of the same names, if the
            configuration makes its width the width of the routed experts, or a multiple of it.
    """

    path: str
    router: str
    stacked: tuple[str, ...] = ("gate_up_proj", "down_proj")
    linears: tuple[tuple[str, ...], ...] = (("gate_proj", "up_proj"), ("down_proj",))
    transposed: bool = False
    shared: str = ""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def name(self) -> str:
        """The path, as the name in messages."""
        return self.path

    def sites(self, block: nn.Module, order: int) -> list[Site]:
        """The sites of all experts; the first ones have the given ``order``."""
        owner = block.get_submodule(self.path)
        if isinstance(owner, nn.ModuleList):
            return [
                Site(
                    f"{self.path}.{expert}.{name}", f"{self.path}.{expert}.{name}.weight",
                    f"{' and '.join(names)} of {expert}", order + place, routed=True,
                )
                for expert in range(len(owner))
                for place, names in enumerate(self.linears)
                for name in names
            ]  # fmt: skip
        count = len(block.get_parameter(f"{self.path}.{self.stacked[0]}"))
        return [
            Site(
                f"{self.path}.{name}.{expert}", f"{self.path}.{name}", f"{name} of {expert}",
                order + place, transposed=self.transposed, expert=expert, routed=True,
            )
            for expert in range(count)
            for place, name in enumerate(self.stacked)
        ]  # fmt: skip

    def groups(self, block: nn.Module, config: Any) -> list[Groups]:
        """The experts, and the channels inside them."""
        parent = self.path.rpartition(".")[0]
        router_tensors = [
            name
            for name in tensors_of(block)
            if name.startswith(f"{self.router}.") or name.rpartition(".")[0] == parent
        ]
        listed = isinstance(block.get_submodule(self.path), nn.ModuleList)
        last = self.linears[-1] if listed else self.stacked[-1:]
        readers, follow = self._shared(block)
        sites = [*self.sites(block, 0), *readers]
        width = experts_width(block, sites, config)
        kinds = [
            expert_groups(block, self.path, last, router_tensors, config),
            expert_channels(block, sites, width, follow) if width else None,
        ]
        return [groups for groups in kinds if groups is not None]

    def _shared(self, block: nn.Module) -> tuple[list[Site], dict[str, int]]:
        """The last Linears of the shared expert, and the dimensions that have its width."""
        *first, last = ([f"{self.shared}.{name}" for name in names] for names in self.linears)
        readers = [Site(path, f"{path}.weight", path) for path in last]
        rows = {f"{path}.{kind}": 0 for path in chain(*first) for kind in ("weight", "bias")}
        tensors, follow = tensors_of(block), rows | {site.parameter: 1 for site in readers}
        dims = {path: dim for path, dim in follow.items() if self.shared and path in tensors}
        return [site for site in readers if site.parameter in dims], dims


def expert_groups(
    block: nn.Module, path: str, last: Sequence[str], router_tensors: Iterable[str], config: Any
) -> Groups | None:
    """The experts of a block, as groups; None if the configuration's number of experts differs.

    If a router first selects among groups of experts (``n_group``), each of these groups is a bin.

    Args:
        path: the path within the block of the module that owns the stacked parameters, or of the
            ``ModuleList`` of experts.
        last: the names of the parameters, or of the Linears of one expert, that produce the output.
        router_tensors: the paths of the router's parameters and buffers.
        config: the model's configuration.
    """
    config, tensors = text_config(config), tensors_of(block)
    owner: Any = block.get_submodule(path)
    listed = isinstance(owner, nn.ModuleList)
    count = len(owner if listed else tensors[f"{path}.{last[0]}"])
    field = next((name for name in _COUNT_FIELDS if getattr(config, name, None) == count), None)
    if field is None:
        return None
    stacked = [] if listed else [name for name in tensors if name.startswith(f"{path}.")]
    dims = {name: _dim_of(tensors[name], count) for name in (*stacked, *router_tensors)}
    parts = [Part(name, dim) for name, dim in dims.items() if dim is not None]
    start = tuple(f"{path}.0.{name}." if listed else f"{path}.{name}" for name in last)
    outputs = [Part(name) for name in tensors if name.startswith(start)]  # biases as well
    if listed:
        outputs = [Part(part.parameter.replace(f"{path}.0.", f"{path}.*.")) for part in outputs]
    bins = getattr(config, "n_group", None) or 1
    return Groups(
        "experts", count, (), tuple(parts), {field: int}, bins, _least(config, bins),
        tuple(outputs), routed=True, members=path if listed else "",
    )  # fmt: skip


def _dim_of(tensor: Tensor, count: int) -> int | None:
    """The first dimension larger than 1, if its size is the number of experts; else None."""
    dim = next((dim for dim, size in enumerate(tensor.shape) if size > 1), None)
    return dim if dim is not None and tensor.shape[dim] == count else None


def picked_experts(config: Any) -> int | None:
    """The number of experts that a router picks for a token; None without such a field."""
    return next(
        (n for name in _PICKED_FIELDS if (n := getattr(text_config(config), name, None))), None
    )


def idle_parameters(block: nn.Module, sites: Iterable[Site], picked: int) -> int:
    """The number of parameters of experts that a token does not use, with ``picked`` experts."""
    routed = [site for site in sites if site.routed]
    if not routed:
        return 0
    first = min(site.order for site in routed)
    count = len({site.input for site in routed if site.order == first})
    stacks = {site.parameter.rpartition(".")[0] for site in routed if site.expert is not None}
    parameters = {site.parameter for site in routed}
    for name, _ in block.named_parameters():  # the biases, which are not sites
        if name.rpartition(".")[0] in stacks:
            parameters.add(name)
    total = sum(block.get_parameter(name).numel() for name in parameters)
    return total * (count - picked) // count


def _least(config: Any, bins: int) -> int:
    """The least number of experts with which a router can still select its usual number.

    A router that selects groups of experts scores a group by its best two experts.
    """
    picked = picked_experts(config) or 1
    selected = getattr(config, "topk_group", None) or bins
    return max(-(-picked // selected), 2 if bins > 1 else 1) * bins


@contextmanager
def one_by_one(model: nn.Module) -> Iterator[None]:
    """Inside the context, the experts of a model or a block are multiplied one after the other.

    Grouped kernels of transformers 5 multiply all slices in one call, which the weight tap cannot
    observe.
    """
    every_config: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {
        id(config): config for config in every_config if hasattr(config, "_experts_implementation")
    }
    before = {key: config._experts_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._experts_implementation = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]
