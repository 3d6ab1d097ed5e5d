"""An adapter for models without one: it determines the sites of each block by a run.

A few tokens are run through one block of each kind, and every operator is observed. This determines
the matrices that multiply the tokens, the matrices that share an input, and the matrices whose
products are added to the residual stream unchanged. Names are not used. A model is refused if its
matrices cannot be determined, or if the conformance checks find a fault of the capture.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from apt.adapter import (
    Call,
    DecoderAdapter,
    Groups,
    ModelInputs,
    Permutable,
    Site,
    State,
    one_by_one,
    record_calls,
)
from apt.adapter.decoder import members
from apt.adapter.expert_channels import expert_channels, experts_width, neurons
from apt.adapter.experts import expert_groups
from apt.adapter.groups import entries_of, tensors_of
from apt.adapter.recording import eval_mode
from apt.checkpoints.skeletons import skeleton_of_class
from apt.checkpoints.smaller import resized
from apt.conformance.checks import CHECKS, Nonconformance, Subject
from apt.conformance.oracle import (
    PRODUCTS,
    Selection,
    Stream,
    is_stack,
    slices_of,
    storage_of,
    used_rows,
)
from apt.errors import AptError, describe, first_line
from apt_adapters.artificial import few_tokens, kind_of, runs, text_part, with_distinct_values
from apt_adapters.widths import Widths, find_widths

_HINT = "it needs an adapter of its own, see docs/adapters.md"
_CHECKS = ("sites", "orientation", "capture", "order", "blocks", "logits", "untouched", "in_time")
_MOST_LEFT = 0.1  # the share of a block's weights in matrices that are not read as sites
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class AutoAdapter(DecoderAdapter):
    """Any causal language model of transformers whose blocks are called one after the other."""

    def __init__(self) -> None:
        self._found: dict[Any, list[Site]] = {}
        self._pairs: dict[Any, bool] = {}  # see _in_pairs
        self._channels: dict[Any, Groups] = {}  # of experts
        self._config: Any = None  # of the examined model
        self._class: type[nn.Module] = nn.Module  # of the examined model
        self._names: list[str] = []  # of its blocks
        self._part = ""  # the path of the part that runs on text alone
        self._called: set[int] = set()  # the indices of the blocks that this part calls
        self._widths: dict[str, Widths] = {}  # by configuration
        self._checked = False  # True after the conformance checks of the sites

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The modules of the language model's ``ModuleList`` with the most parameters."""
        path, layers = _largest_list(model)
        all_blocks = [(f"{path}.{name}", block) for name, block in members(layers)]
        config, is_known = (
            _as_dict(model),
            [kind_of(block) in self._found for _, block in all_blocks],
        )
        # Blocks of equal shapes can differ: pre-norm and post-norm.
        if not self._called or config != self._config or not all(is_known[i] for i in self._called):
            with eval_mode(model):
                filled = with_distinct_values(model, [block for _, block in all_blocks])
                self._found |= self._examine(filled, path)
            modules = {
                name: block for i, (name, block) in enumerate(all_blocks) if i in self._called
            }
            self._channels |= _channels_of_experts(model, modules, self._found, self._pairs)
            self._config, self._checked = config, False
        called_blocks = [entry for index, entry in enumerate(all_blocks) if index in self._called]
        self._class, self._names = type(model), [name for name, _ in called_blocks]
        return called_blocks

    def sites(self, block: nn.Module) -> list[Site]:
        """The sites found for blocks of the same kind."""
        if kind_of(block) not in self._found:
            raise AptError(f"{type(block).__name__} is not a block of an examined model")
        return self._found[kind_of(block)]

    def left_dense_of(self, block: nn.Module) -> tuple[str, ...]:
        """The parameters of the block for which no product with the tokens was observed."""
        sites = {site.parameter for site in self.sites(block)}
        return tuple(name for name, _ in block.named_parameters() if name not in sites)

    def groups(self, block: nn.Module, config: Any) -> list[Groups]:
        """Experts, the channels inside them, and the groups of `find_widths`."""
        experts, channels = self._experts(block, config), self._channels.get(kind_of(block))
        widths = self._widths_of(config).groups.get(kind_of(block), ())
        return [groups for groups in (experts, channels, *widths) if groups is not None]

    def permutable(self, block: nn.Module, config: Any) -> list[Permutable]:
        """The channels among its groups, and the values within heads of `find_widths`."""
        values = self._widths_of(config).values.get(kind_of(block), ())
        return [*super().permutable(block, config), *values]

    def ungrouped(self, block: nn.Module, config: Any) -> dict[str, str]:
        """The sites of the block that cannot lose inputs, with the reasons."""
        read = {name for groups in self.groups(block, config) for name in groups.readers}
        reasons = self._widths_of(config).reasons.get(kind_of(block), {})
        return {site: reason for site, reason in reasons.items() if site not in read}

    def _widths_of(self, config: Any) -> Widths:
        """The result of `find_widths` for a configuration of the model that was examined last."""
        if not hasattr(config, "to_dict"):
            return Widths()
        if (key := repr(config.to_dict())) not in self._widths:
            self._widths[key] = find_widths(self, self._class, config, self._names, self._part)
        return self._widths[key]

    def _experts(self, block: nn.Module, config: Any) -> Groups | None:
        """The experts of the block; None if it has none, or several lists or stacks of them."""
        sites = self.sites(block)
        lists = {
            name for name, module in block.named_modules() if isinstance(module, nn.ModuleList)
        }
        routed = {_role(site.parameter, lists): site for site in sites if site.routed}
        owners = {
            role.partition(".*")[0] if "*" in role else role.rpartition(".")[0] for role in routed
        }
        if len(owners) != 1:
            return None
        owner = owners.pop()
        prefix = owner[: owner.rfind(".") + 1]  # a router has no sites, unlike an attention
        paths = [site.parameter for site in sites if site.parameter.startswith(prefix)]
        with_sites = {path.removeprefix(prefix).partition(".")[0] for path in paths}
        router_tensors = [
            name
            for name in tensors_of(block)
            if name.startswith(prefix)
            and name.removeprefix(prefix).partition(".")[0] not in with_sites
        ]
        order = max(site.order for site in routed.values())
        last = [role for role, site in routed.items() if site.order == order]
        names = [role.removeprefix(f"{owner}.").removeprefix("*.") for role in last]
        names = [name.removesuffix(".weight") for name in names]
        return expert_groups(block, owner, names, router_tensors, config)

    def enter(self, model: nn.Module, tokens: ModelInputs) -> tuple[State, list[Call]]:
        """Record every block's call; the first time, check the sites that were found."""
        blocks = [block for _, block in self.blocks(model)]
        if not self._checked:
            self._checked = True
            if isinstance(tokens, Tensor):
                self._check_conformance(model, tokens[:2, :16])
        return record_calls(model.get_submodule(self._part), blocks, tokens)

    @torch.no_grad()
    def _examine(self, model: nn.Module, path: str) -> dict[Any, list[Site]]:
        """The sites of every kind of block, found by a run on a few tokens."""
        sites_of_kind: dict[Any, list[Site]] = {}
        layers, tokens = model.get_submodule(path), few_tokens(model).numel()
        all_blocks = [(f"{path}.{name}", block) for name, block in members(layers)]
        with _explained(f"{type(model).__name__} on text alone"):
            self._part, self._called = text_part(model, path, [block for _, block in all_blocks])
            blocks = [block for index, block in enumerate(all_blocks) if index in self._called]
            block_runs = runs(self, model.get_submodule(self._part), blocks)
        with _explained(f"the blocks of {type(model).__name__}"):
            for name, block, state, call in block_runs:
                if kind_of(block) in sites_of_kind:
                    continue
                trace = _Trace(block, self.residual(state))
                selection = Selection(dict(_matrices(block)))
                with _explained(f"{name} by itself"), one_by_one(block), selection, trace:
                    self.step(block, state, call)
                sites = trace.sites(tokens, selection.routers)
                _assert_most(name, block, sites, trace.unread(block))
                sites_of_kind[kind_of(block)] = sites
                run = partial(self._stream_after, block, state, call)
                self._pairs[kind_of(block)] = _in_pairs(block, sites, run)
        return sites_of_kind

    def _stream_after(self, block: nn.Module, state: State, call: Call) -> Tensor:
        return self.residual(self.step(block, state, call))

    def _check_conformance(self, model: nn.Module, tokens: Tensor) -> None:
        model = with_distinct_values(model, [block for _, block in self.blocks(model)])
        tokens = tokens.to(next(model.parameters()).device)
        part, adapter = model.get_submodule(self._part), self
        if self._part:
            adapter = AutoAdapter()
            adapter.blocks(part)  # finds the sites
            adapter._checked = True
        with eval_mode(model), _explained(type(model).__name__):
            for name in _CHECKS:
                try:
                    CHECKS[name](Subject(adapter, part, tokens))
                except Nonconformance as error:
                    line = f"adapter auto does not fit: {first_line(error)}"
                    raise AptError(line, _HINT) from error


@contextmanager
def _explained(subject: str) -> Iterator[None]:
    """Convert any exception of a model to an `AptError` of one line."""
    try:
        yield
    except AptError as error:
        raise AptError(error.message, error.hint or _HINT) from error
    except Exception as error:
        raise AptError(f"adapter auto cannot run {subject}: {describe(error)}", _HINT) from error


def _as_dict(model: nn.Module) -> dict[str, Any] | None:
    """The values of the model's configuration, if it has one."""
    config: Any = getattr(model, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else None


def _in_pairs(block: nn.Module, sites: Sequence[Site], run: Callable[[], Tensor]) -> bool:
    """True if the rows of a gate and of the other weight alternate in the stacks of experts.

    If they alternate, and no expert reads its first channel, the output of the block does not
    depend on the first two rows.
    """
    tensors, width = tensors_of(block), ("", neurons(block, sites))
    channels = expert_channels(block, sites, width, {}, pairs=True)
    if channels is None or not any(part.each > 1 for part in channels.parts):
        return False
    readers = [site for site in sites if site.name in channels.readers]
    last = {site.parameter for site in readers}
    entries = [(p.parameter, v[0]) for s in readers for p, v in entries_of(tensors, channels, s)]
    before = [values.clone() for _, values in entries]
    try:
        for path, values in entries:
            values.mul_(path not in last)
        expected = run()
        for _, values in entries:
            values.neg_()
        return torch.equal(run(), expected)
    finally:
        for (_, values), original in zip(entries, before, strict=True):
            values.copy_(original)


def _channels_of_experts(
    model: Any, blocks: dict[str, nn.Module], sites: dict[Any, list[Site]], pairs: dict[Any, bool]
) -> dict[Any, Groups]:
    """The channels inside experts, by the kind of their block.

    A second model without weights and with another width of its experts shows which parameters
    follow this width. There are no groups if parameters outside experts and MLPs follow it.
    """
    config = getattr(model, "config", None)
    candidates = {experts_width(block, sites[kind_of(block)], config) for block in blocks.values()}
    widths = [width for width in candidates if width is not None]
    if len(widths) != 1:
        return {}
    changed, groups_of_kind, covered = (
        _following(model, *widths[0]),
        dict[Any, Groups](),
        set[str](),
    )
    for name, block in blocks.items():
        start, kind = f"{name}.", kind_of(block)
        follow = {p.removeprefix(start): d for p, d in changed.items() if p.startswith(start)}
        groups = expert_channels(block, sites[kind], widths[0], follow, pairs=pairs.get(kind))
        if groups is not None and {(p.parameter, p.dim) for p in groups.parts} == {*follow.items()}:
            groups_of_kind[kind] = groups
            covered.update(start + path for path in follow)
    return groups_of_kind if covered == changed.keys() else {}


def _following(model: Any, field: str, count: int) -> dict[str, int]:
    """The dimension of each parameter that follows a width; empty if no other width is possible."""
    other_count = count // 2 if count % 2 == 0 else 2 * count
    groups = Groups("width", count, (), (), {field: int})
    try:
        config = resized(model.config, [(groups, count - other_count)], (), 0)
        changed = dict(skeleton_of_class(type(model), config, model.config).named_parameters())
    except Exception:  # a configuration, or a class, may refuse a width in any way
        return {}
    return {
        name: dim
        for name, parameter in model.named_parameters()
        for dim, size in enumerate(parameter.shape)
        if name in changed and changed[name].shape[dim : dim + 1] != (size,)
    }


def _assert_most(name: str, block: nn.Module, sites: list[Site], unread: Collection[str]) -> None:
    """Raise if many weights of a block are not sites; weights that no operator reads may be."""
    site_parameters = {site.parameter for site in sites}
    sizes = {n: p.numel() for n, p in block.named_parameters() if p.ndim > 1 and n not in unread}
    unread_sizes = {n: size for n, size in sizes.items() if n not in site_parameters}
    matrices = sum(size for n, size in unread_sizes.items() if _is_matrix(block, n))
    total = sum(sizes.values())
    if (
        not site_parameters
        or matrices > _MOST_LEFT * total
        or sum(unread_sizes.values()) > total / 2
    ):
        largest = max(unread_sizes, key=lambda n: unread_sizes[n], default="a matrix")
        raise AptError(
            f"adapter auto found no input of {name}.{largest}, a large part of the block", _HINT
        )


def _is_matrix(block: nn.Module, name: str) -> bool:
    """True for the weight of a Linear and for stacked matrices; False for a convolution."""
    owner = block.get_submodule(name.rpartition(".")[0])
    stacked = block.get_parameter(name).ndim > 2 and not _is_convolution(block, name)
    return stacked or isinstance(owner, nn.Linear)


def _is_convolution(block: nn.Module, name: str) -> bool:
    return isinstance(block.get_submodule(name.rpartition(".")[0]), _CONVOLUTIONS)


def _largest_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list with the most parameters in the language model, or else in the complete model."""
    sizes = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    if not sizes:
        raise AptError(f"adapter auto finds no list of blocks in {type(model).__name__}", _HINT)
    language = _language_model(model)
    module_ids = {id(module) for module in language.modules()}
    names = [name for name in sizes if id(model.get_submodule(name)) in module_ids]
    path = max(names or sizes, key=lambda name: sizes[name])
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    return path, layers


def _language_model(model: Any) -> nn.Module:
    """The part of a model that produces the text; another part, for images, can be larger."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return decoder if isinstance(decoder, nn.Module) else model


_Key = tuple[str, int | None]  # the path of a parameter, and the index of an expert in a stack


@dataclass
class _Use:
    """The products with one matrix.

    Attributes:
        inputs: the storages of the inputs.
        rows: the number of rows of each input.
        transposed: True if the matrix is stored (in, out).
    """

    inputs: list[tuple[Any, ...]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    transposed: bool = False


class _Trace(Stream[_Key]):  # type: ignore[no-untyped-call]
    """Records the inputs of a block's matrices, and the products added to the residual stream."""

    def __init__(self, block: nn.Module, stream: Tensor) -> None:
        self._tensors = matrices = dict(_matrices(block))
        super().__init__(matrices, stream)
        self._matrices = {storage_of(p): (key, p) for key, p in matrices.items()}
        self._lists = {n for n, m in block.named_modules() if isinstance(m, nn.ModuleList)}
        self._families = _families(matrices, self._lists)
        self._uses: dict[_Key, _Use] = {}
        self._read: set[int] = set()  # the storages of all operands

    def unread(self, block: nn.Module) -> set[str]:
        """The parameters that no operator read, such as an unused cross attention.

        Members of a ``ModuleList`` are left out: they may be experts without a token in this run.
        """
        return {
            name
            for name, parameter in block.named_parameters()
            if parameter.untyped_storage().data_ptr() not in self._read
            and _role(name, self._lists) == name
        }

    def sites(self, tokens: int, selecting: Collection[_Key]) -> list[Site]:
        """The sites: the matrices that multiply all ``tokens``, once or several times.

        The matrices of experts are sites if together they multiply every token equally often.

        Args:
            tokens: the number of tokens in the run.
            selecting: the matrices whose products decide a selection. In a block with experts they
                are routers, and not sites.
        """
        complete = {key for key, use in self._uses.items() if set(use.rows) == {tokens}}
        routed = {
            key
            for key in self._uses
            if not complete.issuperset(self._families[key])
            and self._share_out(self._families[key], tokens)
        }
        names: dict[tuple[Any, ...], str] = {}  # of the inputs
        orders: dict[str, int] = {}
        site_of: dict[_Key, Site] = {}
        for key, use in self._uses.items():
            if key in site_of or key not in complete | routed:
                continue  # it multiplies other values, a table of positions for instance
            if (routed and key in selecting) or self._gates(key, routed, bool(selecting)):
                continue
            name = names.setdefault(use.inputs[0], _short(key))
            order = orders.setdefault(name, len(orders))
            if key in routed:
                site_of |= _expert_sites(self._families[key], order, use)
            else:
                site_of[key] = Site(
                    _short(key), key[0], name, order, key in self.added, use.transposed, key[1],
                    calls=len(use.rows),
                )  # fmt: skip
        return list(site_of.values())

    def _share_out(self, members: Sequence[_Key], tokens: int) -> bool:
        """True if several matrices together multiply every token equally often."""
        rows = sum(sum(self._uses[key].rows) for key in members if key in self._uses)
        return len(members) > 1 and rows > 0 and rows % tokens == 0

    def _gates(self, key: _Key, routed: Collection[_Key], router: bool) -> bool:
        """True for the weight of a gate beside experts, which has one output.

        If no selection showed the router, a matrix with one output for each expert is the router.
        """
        shape = self._tensors[key].shape
        outputs = shape[1] if self._uses[key].transposed else shape[0]
        return key not in routed and any(
            (outputs == 1 or (outputs == len(self._families[other]) and not router))
            and key[0].startswith(self._around(other))
            for other in routed
        )

    def _around(self, key: _Key) -> str:
        """The prefix of the paths of modules beside the experts that own a matrix."""
        experts = _role(key[0], self._lists).partition(".*")[0]
        if key[1] is not None:
            experts = experts.rpartition(".")[0]
        return f"{experts.rpartition('.')[0]}.".lstrip(".")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the operator; if it is a product, record its factors."""
        result = super().__torch_dispatch__(func, types, args, kwargs)
        operands = (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        self._read.update(operand.untyped_storage().data_ptr() for operand in operands)
        if func in PRODUCTS:
            left, right = (args[place] for place in PRODUCTS[func])
            self._use(right, left, turned=False)
            self._use(left, right, turned=True)
        return result

    def _use(self, factor: Tensor, other: Tensor, *, turned: bool) -> None:
        if storage_of(factor) not in self._matrices:
            return
        if turned:
            factor, other = factor.transpose(-1, -2), other.transpose(-1, -2)  # as in X Wᵀ
        for weight, inputs in slices_of(factor, other):
            key, matrix = self._matrices.get(storage_of(weight), (None, None))
            if key is None or matrix is None or weight.numel() != matrix.numel():
                continue
            use = self._uses.setdefault(key, _Use())
            use.inputs.append((*storage_of(inputs), inputs.numel()))
            use.rows.append(len(used_rows(inputs, is_stack(factor))))
            use.transposed = weight.stride(-1) == 1 and weight.shape[-1] > 1


def _matrices(block: nn.Module) -> Iterator[tuple[_Key, Tensor]]:
    """The matrices of a block; the slices of stacked experts are separate matrices."""
    for name, parameter in block.named_parameters():
        if parameter.ndim == 2:
            yield (name, None), parameter
        elif parameter.ndim == 3 and not _is_convolution(block, name):
            for expert, weight in enumerate(parameter):
                yield (name, expert), weight


def _families(matrices: Collection[_Key], lists: Collection[str]) -> dict[_Key, list[_Key]]:
    """For each matrix, all matrices in the same role.

    The slices of a stack have one role, and so have the weights of one path in the members of a
    ``ModuleList``. Any other matrix is alone in its role.
    """
    families: dict[str, list[_Key]] = {}
    for key in matrices:
        families.setdefault(_role(key[0], lists), []).append(key)
    return {key: members for members in families.values() for key in members}


def _role(parameter: str, lists: Collection[str]) -> str:
    """The path of a parameter, without the index in the innermost ``ModuleList``."""
    names = parameter.split(".")
    for place in range(len(names) - 1, 0, -1):
        if ".".join(names[:place]) in lists:
            return ".".join([*names[:place], "*", *names[place + 1 :]])
    return parameter


def _expert_sites(members: Sequence[_Key], order: int, use: _Use) -> dict[_Key, Site]:
    """The routed sites of matrices in the same role; ``use`` is the use of one of them."""
    return {
        (parameter, expert): Site(
            _short((parameter, expert)), parameter, f"input {order} of {index}", order,
            transposed=use.transposed, expert=expert, routed=True,
        )
        for index, (parameter, expert) in enumerate(members)
    }  # fmt: skip


def _short(key: _Key) -> str:
    """The name of a site."""
    name = key[0].removesuffix(".weight")
    return name if key[1] is None else f"{name}.{key[1]}"
