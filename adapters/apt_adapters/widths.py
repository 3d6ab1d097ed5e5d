"""The channels and heads of any model, found by changes of its configuration.

A field is a width if a smaller value makes tensors of the blocks smaller, and no other tensors.
Sites that lose inputs are the readers of its groups. A backward pass in a block with artificial
values finds the entries of a group. The gradient is NaN for the inputs that the group produces, and
reaches all entries on which these inputs depend. Entries on which no other input depends belong to
the group. At the end, a check removes some groups. The smaller block, with the call of the smaller
model, must return the same output as the complete block without the columns of these groups.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from math import gcd
from operator import mul
from re import fullmatch, sub
from typing import Any, get_args

import torch
from torch import Tensor, nn

from apt.adapter import (
    Adapter,
    Call,
    Groups,
    Part,
    Permutable,
    Site,
    State,
    one_by_one,
    record_calls,
)
from apt.adapter.groups import without
from apt.adapter.text_config import hidden_size, text_config
from apt.checkpoints.skeletons import skeleton_of_class
from apt.checkpoints.smaller import resized
from apt_adapters.artificial import few_tokens, kind_of, runs, with_distinct_values, with_values

Fields = Mapping[str, Callable[[int], int]]
_Changes = dict[tuple[str, int], int]  # the entries of a group, by tensor and dimension
_SHARED = r"_?(attention|key_value|key|value|kv)"  # in the names of numbers of heads of one kind
_NUMBER_OF_HEADS = r"(num_|n_|decoder_)?(attention_)?heads?"
_TRIED = 3  # the number of smaller values of a field
_SAME = 1e-3  # of the effect of the removal
_ROUNDING = 1e-5  # of the largest output


class _NoGroups(Exception):
    """The reason why the changed entries of a block do not form groups."""


@dataclass(frozen=True)
class _Run:
    """The first block of a kind, and its call."""

    name: str
    block: nn.Module
    before: State
    call: Call
    sites: Sequence[Site]


@dataclass
class Widths:
    """The groups of a model.

    Attributes:
        groups: the groups of each kind of block.
        reasons: for each kind of block, the sites that add to the stream and cannot lose inputs,
            with the reasons.
        values: for each kind of block, the values of heads that can be reordered within a head.
    """

    groups: dict[Any, list[Groups]] = field(default_factory=dict)
    reasons: dict[Any, dict[str, str]] = field(default_factory=dict)
    values: dict[Any, list[Permutable]] = field(default_factory=dict)


def find_widths(
    adapter: Adapter,
    model_class: type[nn.Module],
    config: Any,
    names: Sequence[str],
    part: str = "",
) -> Widths:
    """Find the groups of a model; none if it cannot be built from its configuration.

    Args:
        adapter: the adapter of the model, for the sites of its blocks.
        model_class: the class of the model.
        config: the configuration. A model that cannot be built from it has no groups.
        names: the names of the blocks.
        part: the path of the part of the model that runs on text alone.
    """
    try:
        model = _Model(adapter, model_class, config, names, part)
    except Exception:  # a class of any origin can fail in any way
        return Widths()
    input_counts = {width for _, _, width in model.sites()}
    candidates = [model.groups(*each) for each in _candidates(text_config(config), input_counts)]
    unread = {width for _, _, width in model.unread(candidates)}
    candidates += [model.groups(*each) for each in _unset(text_config(config), unread)]
    widths = Widths(reasons=model.reasons(candidates))
    for groups in _named([each for each in candidates if each]):
        for block, each in groups.items():
            widths.groups.setdefault(block, []).append(each)
    widths.values = {kind: model.values(kind, each) for kind, each in widths.groups.items()}
    return widths


def _candidates(config: Any, inputs: set[int]) -> Iterator[tuple[int, Fields]]:
    """The fields, alone and in pairs, that can be the number of groups of some inputs."""
    record = config.to_dict()
    numbers = {
        name: value
        for name, value in record.items()
        if type(value) is int and value > 1 and any(width % value == 0 for width in inputs)
    }
    for name, value in numbers.items():
        yield value, {name: int, **_size_of_heads(config, name, value)}
    heads = sorted((name for name in numbers if _counts_heads(name)), key=lambda n: -numbers[n])
    for larger, smaller in combinations(heads, 2):
        ratio, remainder = divmod(numbers[larger], numbers[smaller])
        if not remainder and sub(_SHARED, "", larger) == sub(_SHARED, "", smaller):
            fields = {larger: int if ratio == 1 else partial(mul, ratio), smaller: int}
            yield numbers[smaller], {**fields, **_size_of_heads(config, larger, numbers[larger])}


def _unset(config: Any, inputs: set[int]) -> Iterator[tuple[int, Fields]]:
    """The fields without a value that can be a number of inputs, such as GPT-2's ``n_inner``."""
    hints = {
        name: hint
        for kind in reversed(type(config).__mro__)
        for name, hint in vars(kind).get("__annotations__", {}).items()
    }
    for name, value in config.to_dict().items():
        if value is None and int in get_args(hints.get(name)):
            yield from ((width, {name: int}) for width in inputs)


def _counts_heads(name: str) -> bool:
    return "head" in name and "dim" not in name and "size" not in name


def _size_of_heads(config: Any, name: str, count: int) -> Fields:
    """The size of a head, if it would change with the number of heads; else empty."""
    attention = fullmatch(_NUMBER_OF_HEADS, sub(_SHARED, "", name))
    if not attention or getattr(config, "head_dim", None) is not None:
        return {}
    size = hidden_size(config) // count
    return {"head_dim": lambda kept: size}


class _Model:
    """A model with artificial values, in which the first block of each kind is examined."""

    def __init__(
        self,
        adapter: Adapter,
        model_class: type[nn.Module],
        config: Any,
        names: Sequence[str],
        part: str,
    ) -> None:
        self._adapter, self._class, self._config = adapter, model_class, config
        self._names, self._part = names, part
        skeleton = self._built(config)
        blocks = self._blocks(skeleton)
        self._shapes, self._kinds = _shapes(skeleton), {n: kind_of(b) for n, b in blocks}
        filled = with_distinct_values(skeleton, [block for _, block in blocks])
        parameters = list(skeleton.named_parameters(remove_duplicate=False))
        counts = Counter(id(parameter) for _, parameter in parameters)
        self._shared = {name for name, parameter in parameters if counts[id(parameter)] > 1}
        self._failed: dict[tuple[Any, str], str] = {}
        self._runs: dict[Any, _Run] = {}
        runner = filled.get_submodule(part)
        for name, block, before, call in runs(adapter, runner, self._blocks(filled)):
            run = _Run(name, block, before, call, adapter.sites(block))
            self._runs.setdefault(self._kinds[name], run)

    def _built(self, config: Any) -> nn.Module:
        return skeleton_of_class(self._class, config, self._config).float().eval()

    def _blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        return [(name, model.get_submodule(name)) for name in self._names]

    def sites(self) -> Iterator[tuple[Any, Site, int]]:
        """The sites of each kind of block that are not routed, and their numbers of inputs."""
        for kind, run in self._runs.items():
            for site in run.sites:
                if not site.routed:
                    yield kind, site, _width(site, run.block)

    def unread(self, all_groups: Sequence[Mapping[Any, Groups]]) -> Iterator[tuple[Any, Site, int]]:
        """The sites that read no groups, but add to the stream or failed with fewer inputs."""
        read = {(kind, name) for each in all_groups for kind in each for name in each[kind].readers}
        for kind, site, width in self.sites():
            inner = site.residual or (kind, site.parameter) in self._failed
            if inner and (kind, site.name) not in read:
                yield kind, site, width

    def reasons(self, all_groups: Sequence[Mapping[Any, Groups]]) -> dict[Any, dict[str, str]]:
        """The reasons why sites read no groups; see `Widths`."""
        config, reasons = type(text_config(self._config)).__name__, dict[Any, dict[str, str]]()
        for kind, site, _ in self.unread(all_groups):
            default = f"no field of {config} changes its inputs alone"
            reason = self._failed.get((kind, site.parameter), default)
            reasons.setdefault(kind, {})[site.name] = reason
        return reasons

    def groups(self, count: int, fields: Fields) -> dict[Any, Groups]:
        """The groups of each kind of block that the fields count; empty without such groups."""
        template = Groups("", count, (), (), fields)
        for kept in _smaller_numbers(count):
            try:
                config = resized(self._config, [(template, count - kept)], range(1), 1)
                smaller = self._built(config)
                changes = self._changes(smaller, count - kept)
                calls = self._called(smaller) if changes else {}
            except Exception:  # a class can refuse a number in any way
                continue
            if not changes:
                return {}
            try:
                groups_of_kind = {
                    kind: self._laid_out(kind, template, c) for kind, c in changes.items()
                }
                _check_runs(groups_of_kind.values())
            except _NoGroups as error:
                self._fail(changes, str(error))
                return {}
            heads = any(map(_counts_heads, fields))
            for bins in _divisors(gcd(count, kept)) if heads else [1]:
                binned = {
                    kind: replace(groups, bins=bins) for kind, groups in groups_of_kind.items()
                }
                if self._same(calls, binned, kept):
                    return binned
            name = next(iter(fields))
            self._fail(changes, f"with another {name} the block computes something else")
        return {}

    def _fail(self, changes: Mapping[Any, _Changes], reason: str) -> None:
        for kind, each in changes.items():
            for site in self._runs[kind].sites:
                if (site.parameter, _inputs_of(site)) in each:
                    self._failed[kind, site.parameter] = reason

    def _changes(self, smaller: nn.Module, removed: int) -> dict[Any, _Changes]:
        """The entries of a group in each kind of block; empty if other tensors change as well."""
        shapes, changes_of_block = _shapes(smaller), {name: _Changes() for name in self._kinds}
        if shapes.keys() != self._shapes.keys():
            return {}
        for name, shape in self._shapes.items():
            if shapes[name] == shape:
                continue
            block = next((each for each in changes_of_block if name.startswith(f"{each}.")), None)
            lost = [before - after for before, after in zip(shape, shapes[name], strict=True)]
            dims = [dim for dim, number in enumerate(lost) if number]
            if block is None or len(dims) != 1 or name in self._shared:
                return {}
            if lost[dims[0]] < 0 or lost[dims[0]] % removed:
                return {}
            changes_of_block[block][name.removeprefix(f"{block}."), dims[0]] = (
                lost[dims[0]] // removed
            )
        kinds = dict[Any, _Changes]()
        for block, kind in self._kinds.items():
            if kinds.setdefault(kind, changes_of_block[block]) != changes_of_block[block]:
                return {}
        return {kind: changes for kind, changes in kinds.items() if changes}

    def _laid_out(self, kind: Any, groups: Groups, changes: _Changes) -> Groups:
        """The groups with their readers and parts.

        Raises:
            _NoGroups: a tensor has entries that belong to no group, or to several.
        """
        run, readers = self._runs[kind], dict[tuple[str, int], Site]()
        for site in run.sites:
            if site.routed and any(path == site.parameter for path, _ in changes):
                raise _NoGroups("its inputs are those of experts")
            if (key := (site.parameter, _inputs_of(site))) in changes:
                readers[key] = site
                if changes[key] * groups.count != _width(site, run.block):
                    raise _NoGroups("it has inputs that belong to no group")
        if not readers:
            raise _NoGroups("")
        parts = {key: [Part(*key, changes[key])] for key in readers}
        others = [key for key in changes if key not in readers]
        own_entries = self._own(run, {site: changes[key] for key, site in readers.items()}, others)
        for key, entries in zip(others, own_entries, strict=True):
            if len(entries) != changes[key]:
                raise _NoGroups(f"entries of {key[0]} belong to several groups")
            parts[key] = [Part(*key, len(each), each[0]) for each in _resultin(entries)]
        all_parts = tuple(part for each in parts.values() for part in each)
        return replace(
            groups, readers=tuple(site.name for site in readers.values()), parts=all_parts
        )

    def _own(
        self, run: _Run, readers: Mapping[Site, int], dims: Sequence[tuple[str, int]]
    ) -> list[list[int]]:
        """The entries on which only the first ``readers[site]`` inputs of the readers depend."""
        inputs, parameters = dict[Site, Tensor](), dict(run.block.named_parameters())
        if missing := [path for path, _ in dims if path not in parameters]:
            raise _NoGroups(f"the buffer {missing[0]} changes as well")

        def keep(site: Site, x: Tensor) -> None:
            inputs[site] = x

        tensors = [parameters[path].requires_grad_() for path, _ in dims]
        tap = self._adapter.capture(run.block, list(readers), keep)
        with torch.enable_grad(), one_by_one(run.block), tap:
            self._adapter.step(run.block, run.before, run.call)
        gradients = []
        for first in (True, False):
            seeds = [_seed(x, readers[site], first=first) for site, x in inputs.items()]
            gradients.append(
                torch.autograd.grad(
                    list(inputs.values()), tensors, seeds, retain_graph=first, allow_unused=True
                )
            )
        return [
            (_reached(first, dim) & ~_reached(other, dim)).nonzero().flatten().tolist()
            if first is not None and other is not None
            else []
            for (_, dim), first, other in zip(dims, *gradients, strict=True)
        ]

    def _called(self, smaller: nn.Module) -> dict[str, tuple[nn.Module, Call]]:
        """The blocks of a smaller model, which have no weights, and their calls."""
        parameters = {id(p): p for _, block in self._blocks(smaller) for p in block.parameters()}
        filled = with_values(smaller, parameters)
        blocks = [block for _, block in self._blocks(filled)]
        _, calls = record_calls(filled.get_submodule(self._part), blocks, few_tokens(filled))
        return dict(zip(self._names, zip(blocks, calls, strict=True), strict=True))

    @torch.no_grad()
    def _same(
        self, smaller: Mapping[str, tuple[nn.Module, Call]], groups: Mapping[Any, Groups], kept: int
    ) -> bool:
        """True if smaller blocks return the same as blocks that do not read the removed groups."""
        for kind, each in groups.items():
            run = self._runs[kind]
            block, call = smaller[run.name]
            for removed in _removals(each, kept):
                expected, effect = self._unread(run, each, removed)
                state = without(run.block.state_dict(), [(each, removed)])
                try:
                    block.load_state_dict(state, assign=True)
                    output = self._output(block, run.before, call)
                except Exception:  # a class can refuse a number in any way
                    return False
                if not _near(output, expected, effect):
                    return False
        return True

    @torch.no_grad()
    def values(self, kind: Any, groups_of_block: Sequence[Groups]) -> list[Permutable]:
        """The values within heads that can be reordered without a change of the block's output."""
        run, permutables = self._runs[kind], list[Permutable]()
        output = self._output(run.block, run.before, run.call)
        for permutable in (each for groups in groups_of_block for each in _within(groups)):
            columns_only = self._shuffled(run, replace(permutable, parts=permutable.parts[-1:]))
            effect = float((columns_only - output).abs().max())
            if effect > 0 and _near(self._shuffled(run, permutable), output, effect):
                permutables.append(permutable)
        return permutables

    def _shuffled(self, run: _Run, permutable: Permutable) -> Tensor:
        """The output of a block with reordered inputs; the order is restored."""
        parameters, order = dict(run.block.named_parameters()), permutable.random_order()
        permutable.permute(parameters, order)
        output = self._output(run.block, run.before, run.call)
        permutable.permute(parameters, order.argsort())
        return output

    def _output(self, block: nn.Module, before: State, call: Call) -> Tensor:
        with one_by_one(block):
            return self._adapter.residual(self._adapter.step(block, before, call))

    def _unread(self, run: _Run, groups: Groups, removed: Sequence[int]) -> tuple[Tensor, float]:
        """The output of a block that does not read some groups, and the size of the change."""
        complete, block = self._output(run.block, run.before, run.call), run.block
        weights = [
            site.oriented(site.weight(block)) for site in run.sites if site.name in groups.readers
        ]
        originals = [weight.clone() for weight in weights]
        for weight in weights:
            torch.unflatten(weight, 1, (groups.count, -1))[:, removed] = 0
        output = self._output(block, run.before, run.call)
        for weight, original in zip(weights, originals, strict=True):
            weight.copy_(original)
        return output, float((output - complete).abs().max())


def _within(groups: Groups) -> Iterator[Permutable]:
    """Candidates: the inputs of each group, to be reordered with the rows of one module."""
    if len(groups.readers) != 1 or groups.routed or groups.apart:
        return
    columns, *others = groups.parts
    modules = dict[tuple[str, int], list[Part]]()  # with their biases
    for part in others:
        modules.setdefault((part.parameter.rpartition(".")[0], part.start), []).append(part)
    for parts in modules.values():
        size = parts[0].each
        alike = {(part.dim, part.each) for part in parts} == {(0, size)}
        if alike and size > 1 and columns.each % size == 0:
            yield Permutable(groups.readers[0], (*parts, columns), size, groups.count)


def _check_runs(all_groups: Collection[Groups]) -> None:
    """Raise for groups of several columns that are not heads: neighbours are unrelated."""
    heads = any("head" in name for groups in all_groups for name in groups.fields)
    if not heads and min(groups.parts[0].each for groups in all_groups) > 1:  # columns of a reader
        raise _NoGroups("its inputs can only change many at a time")


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _inputs_of(site: Site) -> int:
    """The dimension of the inputs in the parameter of a site."""
    return (0 if site.transposed else 1) + (site.expert is not None)


def _width(site: Site, block: nn.Module) -> int:
    return site.oriented(site.weight(block)).shape[1]


def _smaller_numbers(count: int) -> list[int]:
    """Some divisors of a number, the largest first."""
    return [n for n in range(count // 2, 0, -1) if count % n == 0][:_TRIED]


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]


def _seed(x: Tensor, columns: int, *, first: bool) -> Tensor:
    """A gradient: NaN for the first columns, or for all other columns; zero elsewhere."""
    seed = torch.zeros_like(x)
    seed[..., slice(columns) if first else slice(columns, None)] = torch.nan
    return seed


def _reached(gradient: Tensor, dim: int) -> Tensor:
    """The mask of the entries of a dimension that a gradient of NaN has reached."""
    return gradient.isnan().movedim(dim, 0).reshape(gradient.shape[dim], -1).any(1)


def _resultin(entries: Sequence[int]) -> list[list[int]]:
    """Increasing numbers, split into runs of consecutive numbers."""
    result: list[list[int]] = []
    for entry in entries:
        if result and result[-1][-1] == entry - 1:
            result[-1].append(entry)
        else:
            result.append([entry])
    return result


def _removals(groups: Groups, kept: int) -> Iterator[list[int]]:
    """Two choices of removed groups: the first ones of every bin, and random ones."""
    bin_size, count = groups.count // groups.bins, (groups.count - kept) // groups.bins
    draw = torch.Generator().manual_seed(0)
    for order in (torch.arange, partial(torch.randperm, generator=draw)):
        yield [
            first + index
            for first in range(0, groups.count, bin_size)
            for index in sorted(order(bin_size)[:count].tolist())
        ]


def _near(output: Tensor, expected: Tensor, effect: float) -> bool:
    allowed = _SAME * effect + _ROUNDING * float(expected.abs().max())
    return output.shape == expected.shape and float((output - expected).abs().max()) <= allowed


def _named(candidates: Sequence[dict[Any, Groups]]) -> Iterator[dict[Any, Groups]]:
    """The groups with names of their kinds, without duplicates."""
    names = set[str]()
    for index, groups in enumerate(candidates):
        if any(_alike(groups, other) for other in candidates[index + 1 :]):
            continue  # a later entry is the same, with the number of key/value heads
        name = _name(next(iter(groups.values())), names)
        names.add(name)
        yield {kind: replace(each, kind=name) for kind, each in groups.items()}


def _alike(groups: Mapping[Any, Groups], other: Mapping[Any, Groups]) -> bool:
    """True if groups have the same parts in all kinds of blocks."""
    parts = [{kind: set(each.parts) for kind, each in one.items()} for one in (groups, other)]
    return parts[0] == parts[1]


def _name(groups: Groups, names: set[str]) -> str:
    """The standard name of a kind, or the name of its field if the standard name is taken."""
    field = next(name for name, value in groups.fields.items() if value is int)
    standard = ""
    has_other_meaning = any(word in field for word in ("attention", "expert", "shared"))
    if groups.parts[0].each == 1 and not has_other_meaning:  # the part of a reader
        standard = "channels"
    elif fullmatch(_NUMBER_OF_HEADS, field):
        standard = "heads"
    if standard and standard not in names:
        return standard
    own_name = field.replace("num_", "").replace("_", "-").replace("kv-", "key-value-")
    return sub("(intermediate|hidden)-size", "channels", own_name)
