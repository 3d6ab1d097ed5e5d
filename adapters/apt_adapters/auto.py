"""An adapter for models without one: it determines the sites of each block by a run.

A few tokens are run through one block of each kind, and every operator is observed. This determines
the matrices that multiply the tokens, the matrices that share an input, and the matrices whose
products are added to the residual stream unchanged. Names are not used. A model is refused if its
matrices cannot be determined, or if the conformance checks find a fault of the capture.

Models other than decoders of text, with one or several stacks, are run on example inputs, and their
stacks are proven by replays, see `chains`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import (
    Call,
    DecoderAdapter,
    Groups,
    ModelInputs,
    Permutable,
    Site,
    Stack,
    State,
    one_by_one,
    record_calls,
)
from apt.adapter.decoder import members
from apt.adapter.expert_channels import expert_channels, experts_width, neurons
from apt.adapter.experts import expert_groups
from apt.adapter.groups import entries_of, tensors_of
from apt.adapter.recording import eval_mode, note_form
from apt.checkpoints.architecture import reads_of
from apt.checkpoints.skeletons import skeleton_of_class
from apt.checkpoints.smaller import resized
from apt.conformance.checks import CHECKS, Nonconformance, Subject
from apt.conformance.oracle import Selection
from apt.errors import AptError, describe, first_line
from apt_adapters.artificial import (
    few_tokens,
    kind_of,
    runs,
    text_part,
    with_distinct_values,
    with_random_values,
)
from apt_adapters.chains import Chains, find_chains
from apt_adapters.example_inputs import example_inputs, same_numbers
from apt_adapters.tracing import HINT, Trace, assert_most, matrices_of, role_of
from apt_adapters.widths import Widths, find_widths

_CHECKS = ("sites", "orientation", "capture", "order", "blocks", "logits", "untouched", "in_time")


class AutoAdapter(DecoderAdapter):
    """Any model of transformers whose blocks are called one after the other, in every stack."""

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
        self._chains: Chains | None = None  # of the examined model, if it is no decoder of text

    def stacks(self, model: nn.Module) -> list[Stack]:
        """The decoder of text, or the stacks that `find_chains` has proven."""
        if _is_decoder(model):
            return super().stacks(model)
        chains = self._chains_of(model)
        stacks = [
            (stack, [(name, model.get_submodule(name)) for name in names])
            for stack, names in chains.stacks
        ]
        for name, block in (each for _, blocks in stacks for each in blocks):
            note_form(block, chains.forms[name])
        return stacks

    def _chains_of(self, model: nn.Module) -> Chains:
        """The stacks of a model; they are searched for when a new model comes."""
        config = _as_dict(model)
        if self._chains is None or config != self._config or type(model) is not self._class:
            with _explained(f"{type(model).__name__}"), eval_mode(model):
                filled = with_random_values(model)
                self._chains = find_chains(filled, example_inputs(filled))
            self._found |= self._chains.sites
            self._config, self._class, self._checked = config, type(model), True
        return self._chains

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The blocks of all stacks.

        For a decoder of text: the modules of the ``ModuleList`` with the most parameters.
        """
        if not _is_decoder(model):
            return [block for _, blocks in self.stacks(model) for block in blocks]
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

    def idle_of(self, block: nn.Module) -> Sequence[str]:
        """The matrices of a block that multiply only zeros, or a block of its kind does so."""
        return () if self._chains is None else self._chains.idle.get(kind_of(block), ())

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
        if not hasattr(config, "to_dict") or self._chains is not None:
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
        routed = {role_of(site.parameter, lists): site for site in sites if site.routed}
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
        if not _is_decoder(model):
            return self.enter_next(model, tokens, ())
        blocks = [block for _, block in self.blocks(model)]
        if not self._checked:
            self._checked = True
            if isinstance(tokens, Tensor):
                self._check_conformance(model, tokens[:2, :16])
        return record_calls(model.get_submodule(self._part), blocks, tokens)

    def enter_next(
        self, model: nn.Module, tokens: ModelInputs, ends: Sequence[State]
    ) -> tuple[State, list[Call]]:
        """Record the calls of the next stack; random numbers of the model are the same again."""
        with same_numbers():
            return super().enter_next(model, tokens, ends)

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
                trace = Trace(block, self.residual(state))
                selection = Selection(dict(matrices_of(block)))
                with _explained(f"{name} by itself"), one_by_one(block), selection, trace:
                    self.step(block, state, call)
                sites = trace.sites(tokens, selection.routers)
                assert_most(name, block, sites, trace.unread(block))
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
                    raise AptError(line, HINT) from error


@contextmanager
def _explained(subject: str) -> Iterator[None]:
    """Convert any exception of a model to an `AptError` of one line."""
    try:
        yield
    except AptError as error:
        raise AptError(error.message, error.hint or HINT) from error
    except Exception as error:
        raise AptError(f"adapter auto cannot run {subject}: {describe(error)}", HINT) from error


def _is_decoder(model: nn.Module) -> bool:
    """True for a decoder of text, and for a model that is not known to be another one."""
    config = getattr(model, "config", None)
    return config is None or reads_of(type(model), config).windows


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


def _largest_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list with the most parameters in the language model, or else in the complete model."""
    sizes = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    if not sizes:
        raise AptError(f"adapter auto finds no list of blocks in {type(model).__name__}", HINT)
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
