"""The stacks of a model of any kind, found by one run and proven by replays.

The members of all lists of modules are observed in a run. A member is a block if it is called once,
if it takes and returns a stream, and if most of its weights multiply all rows of the stream, or all
rows that an earlier stack has returned. Otherwise the lists inside of it are examined. Blocks of
which each takes the stream that the one before returned are a chain, and a chain is a stack. Then
each stack is run as the core will run it: a recording of its calls with all earlier stacks replaced
by what they return, and one step for each block. Where the result is another one than that of the
run, a new stack begins; a block that still returns something else is left dense.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Site, one_by_one, record_calls
from apt.adapter.decoder import members
from apt.adapter.recording import eval_mode, note_form, state_keyword
from apt.adapter.weight_tap import WeightTap
from apt.conformance.oracle import Selection
from apt.errors import AptError, describe
from apt_adapters.artificial import kind_of
from apt_adapters.example_inputs import run_quietly, same_numbers
from apt_adapters.tracing import HINT, Trace, assert_most, matrices_of

_LEAST = 0.5  # the share of the weights of all lists that must be in proven blocks
_SMALL = 0.1  # of the largest list: the layers of a head
_SAME = 1e-3  # of the largest output
_GENERAL = {
    "base_model",
    "block",
    "blocks",
    "h",
    "layer",
    "layers",
    "model",
    "stages",
    "transformer",
}
_KINDS = {
    "vision": ("vision", "visual", "image"),
    "text": ("text", "language"),
    "audio": ("audio", "speech", "sound"),
    "decoder": ("decoder",),
    "encoder": ("encoder",),
}

Sites = dict[Any, list[Site]]  # by kind of block
Names = list[tuple[str, list[str]]]  # the stacks, and the names of their blocks


@dataclass(frozen=True)
class _Ran:
    """The only call of a module in a run.

    Attributes:
        order: its place among all calls.
        stream, output: the stream before and after it, as the model passed it.
        value: a copy of the output.
        values: the length of the tuple that it returned; None for a tensor.
    """

    name: str
    block: nn.Module
    order: int
    stream: Tensor
    output: Tensor
    value: Tensor
    values: int | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def rows(self) -> int:
        """The number of rows of the stream."""
        return self.stream[..., 0].numel()


@dataclass
class Chains:
    """The stacks of a model.

    Attributes:
        stacks: their names, and the names of their blocks.
        sites: the sites of each kind of block.
        idle: the names of the matrices of each kind of block that multiply only zeros.
        forms: for the name of each block, the length of the tuple that it returns; None for a
            tensor.
    """

    stacks: Names
    sites: Sites
    idle: Mapping[Any, Sequence[str]]
    forms: dict[str, int | None]


def find_chains(model: nn.Module, inputs: Mapping[str, Tensor]) -> Chains:
    """The stacks of a model, proven by replays on some inputs.

    Raises:
        AptError: most weights of its lists are in no block that could be proven.
    """
    lists = outer_lists(model)
    if not lists:
        raise AptError(f"adapter auto finds no list of blocks in {type(model).__name__}", HINT)
    found = _Chains(model, inputs)
    blocks = sorted(
        (ran for path in lists for ran in found.readable(path)), key=lambda ran: ran.order
    )
    chains = found.proven(_chained(blocks))
    proven = {name for chain in chains for name in chain}
    blocks = [found.ran[name] for name in proven]
    modules = dict(model.named_modules())
    weight = sum(map(_weight, map(modules.__getitem__, proven)))
    if weight < _LEAST * sum(_weight(modules[path]) for path in lists) or not proven:
        unchained = AptError("the blocks are not called one after the other", HINT)
        reason = next(iter(found.reasons.values()), unchained)
        message = f"adapter auto cannot prune {type(model).__name__}: {reason.message}"
        raise AptError(message, reason.hint)
    forms = {ran.name: ran.values for ran in blocks}
    return Chains(list(_named(chains)), found.sites, found.idle, forms)


def outer_lists(model: nn.Module) -> list[str]:
    """The paths of the lists of modules that are inside of no other list, without small ones."""
    found = list[str]()
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{path}.") for path in found)
        if not inside and isinstance(module, nn.ModuleList) and _weight(module):
            found.append(name)
    sizes = {name: _weight(model.get_submodule(name)) for name in found}
    return [name for name in found if sizes[name] >= _SMALL * max(sizes.values())]


def _weight(module: nn.Module) -> int:
    """The number of values in the matrices of a module, without those of tables."""
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    owners = {name: id(parameter) for name, parameter in module.named_parameters()}
    return sum(t.numel() for (name, _), t in matrices_of(module) if owners[name] not in tables)


class _Chains:
    """A model under examination."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        self._model, self._inputs = model, inputs
        self.sites: Sites = {}
        self.idle = dict[Any, list[str]]()
        self.reasons: dict[str, AptError] = {}  # why a member of a list is not a block, by its name
        self.ran, self._calls = _observed(model, inputs)

    def readable(self, path: str) -> Iterator[_Ran]:
        """The blocks in a list: its members, or those of lists inside of the members."""
        for name, module in members(self._model.get_submodule(path)):
            full = f"{path}.{name}"
            if not _weight(module):
                continue
            try:
                yield self._read(full)
            except AptError as error:
                if not isinstance(module, nn.ModuleList):
                    self.reasons[full] = error
                yield from self._inside(full, module)

    def _inside(self, name: str, module: nn.Module) -> Iterator[_Ran]:
        """The blocks in the lists inside of a module, or in the module if it is a list."""
        for inner in _inner_lists(module):
            yield from self.readable(f"{name}.{inner}".rstrip("."))

    def _read(self, name: str) -> _Ran:
        """The call of a block whose sites can be read."""
        calls = self._calls.get(name, 0)
        if calls > 1:
            message = f"{name} is called {calls} times in a run, and its weights are shared"
            raise AptError(message, "APT prunes blocks that are called once")
        if name not in self.ran:
            what = "takes and returns no stream" if calls else "is not called"
            raise AptError(f"{name} {what}", HINT)
        ran = self.ran[name]
        if kind_of(ran.block) not in self.sites:
            earlier = [
                other.output[..., 0].numel()
                for other in sorted(self.ran.values(), key=lambda other: other.order)
                if other.order < ran.order and not name.startswith(f"{other.name}.")
            ]
            self.sites[kind_of(ran.block)] = self._traced(ran, earlier)
        return ran

    def _traced(self, ran: _Ran, earlier: Sequence[int]) -> list[Site]:
        """The sites of a block."""
        try:
            return traced(ran, earlier)
        except AptError:
            raise
        except Exception as error:  # a block of any origin can fail in any way
            raise AptError(f"{ran.name} does not run by itself: {describe(error)}") from error

    @torch.no_grad()
    def proven(self, chains: list[list[_Ran]]) -> list[list[str]]:
        """The chains, split where a replay returns something else, without unproven blocks."""
        queue, done, ends = list(chains), list[list[_Ran]](), list[Tensor]()
        while queue:
            chain = queue.pop(0)
            earlier = [([r.block for r in c], end) for c, end in zip(done, ends, strict=True)]
            rows = [c[-1].output[..., 0].numel() for c in done]
            known = {kind_of(ran.block) for c in done for ran in c}
            try:
                for kind, ran in {kind_of(ran.block): ran for ran in reversed(chain)}.items():
                    if kind not in known:  # now with the stacks that it can read
                        self.sites[kind] = traced(ran, rows)
                good, end = self._replayed(chain, earlier)
                reason = f"{chain[0].name} returns something else in a replay"
            except Exception as error:  # a model of any origin can fail in any way
                good, end, reason = (
                    0,
                    None,
                    f"{chain[0].name} cannot be replayed: {describe(error)}",
                )
            if not good and len(chain) > 1:
                queue = sorted([chain[:1], chain[1:], *queue], key=lambda c: c[0].order)
            elif not good:
                self.reasons[chain[0].name] = AptError(reason, HINT)
                inside = list(self._inside(chain[0].name, chain[0].block))
                queue += _chained(sorted(inside, key=lambda ran: ran.order))
                queue.sort(key=lambda c: c[0].order)
            else:
                if good < len(chain):
                    queue.append(chain[good:])
                    queue.sort(key=lambda c: c[0].order)
                done.append(chain[:good])
                assert end is not None
                ends.append(end)
        return [[ran.name for ran in chain] for chain in done]

    def _replayed(
        self, chain: list[_Ran], earlier: Sequence[tuple[Sequence[nn.Module], Tensor]]
    ) -> tuple[int, Tensor | None]:
        """How many of the first blocks of a chain return the same, and the stream after them."""
        for ran in chain:
            note_form(ran.block, ran.values)
        with same_numbers(), eval_mode(self._model), one_by_one(self._model):
            blocks = [ran.block for ran in chain]
            state, calls = record_calls(self._model, blocks, self._inputs, earlier)
            end: Tensor | None = None
            passed: Any = state
            for index, (ran, call) in enumerate(zip(chain, calls, strict=True)):
                counts, filled = dict[Site, int](), set[Site]()

                def count(
                    site: Site,
                    rows: Tensor,
                    counts: dict[Site, int] = counts,
                    filled: set[Site] = filled,
                ) -> None:
                    counts[site] = counts.get(site, 0) + rows[..., 0].numel()
                    if rows.any():
                        filled.add(site)

                sites = self.sites[kind_of(ran.block)]
                weights = {site: site.weight(ran.block) for site in sites}
                with WeightTap(weights, count, [site for site in sites if site.routed]):
                    passed = call.run(ran.block, passed)
                stream = passed[0] if isinstance(passed, tuple) else passed
                if not _near(stream, ran.value) or not self._complete(ran, counts, earlier):
                    return index, end
                end = stream
                # Of zeros nothing can be learned: the queries of an object detector begin as zeros.
                kind, kept = kind_of(ran.block), [s for s in sites if s.routed or s in filled]
                self.sites[kind] = kept
                self.idle.setdefault(kind, []).extend(s.name for s in sites if s not in kept)
        return len(chain), end

    def _complete(
        self,
        ran: _Ran,
        counts: Mapping[Site, int],
        earlier: Sequence[tuple[Sequence[nn.Module], Tensor]],
    ) -> bool:
        """True if every site has received all rows."""
        for site in self.sites[kind_of(ran.block)]:
            rows = earlier[site.stack][1][..., 0].numel() if site.crossing else ran.rows
            if not site.routed and counts.get(site, 0) != site.calls * rows:
                return False
        return True


def traced(ran: _Ran, earlier: Sequence[int]) -> list[Site]:
    """The sites of a block, from its call with a stream of random values.

    Args:
        earlier: the numbers of rows of the earlier stacks.
    """
    draw = torch.Generator().manual_seed(0)  # a router sends tokens of zeros to no expert
    stream = torch.randn(ran.stream.shape, generator=draw).to(ran.stream)
    args, kwargs = ran.args, dict(ran.kwargs)
    if args:
        args = (stream, *args[1:])
    else:
        kwargs[state_keyword(kwargs)] = stream
    trace = Trace(ran.block, stream)
    selection = Selection(dict(matrices_of(ran.block)))
    outer: tuple[AbstractContextManager[Any], ...] = (
        torch.no_grad(), same_numbers(), eval_mode(ran.block), one_by_one(ran.block)
    )  # fmt: skip
    with ExitStack() as stack:
        for context in (*outer, selection, trace):
            stack.enter_context(context)
        ran.block(*args, **kwargs)
    sites = trace.sites(ran.rows, selection.routers, earlier)
    assert_most(ran.name, ran.block, sites, trace.unread(ran.block), convolutions=True)
    return sites


def _observed(
    model: nn.Module, inputs: Mapping[str, Tensor]
) -> tuple[dict[str, _Ran], dict[str, int]]:
    """The calls of members of lists that take and return a stream, and the number of all calls."""
    ran, calls, order = dict[str, _Ran](), dict[str, int](), [0]

    def note(
        name: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        order[0] += 1
        calls[name] = calls.get(name, 0) + 1
        stream = args[0] if args else kwargs.get(state_keyword(kwargs))
        plain = isinstance(result, Tensor)
        output = result if plain else result[0] if type(result) is tuple and result else None
        others = () if plain or output is None else result[1:]
        if not all(value is None or isinstance(value, Tensor) for value in others):
            return  # sizes, which the model goes on with
        if isinstance(stream, Tensor) and isinstance(output, Tensor) and stream.ndim > 1:
            values = None if plain else len(result)
            ran[name] = _Ran(
                name, block, order[0], stream, output, output.clone(), values, args, kwargs
            )

    with ExitStack() as stack:
        for name, module in _members(model):
            hook = module.register_forward_hook(partial(note, name), with_kwargs=True)
            stack.callback(hook.remove)
        stack.enter_context(one_by_one(model))
        run_quietly(model, inputs)
    return ran, calls


def _members(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The members of all lists with matrices."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            for name, member in members(module):
                if _weight(member):
                    yield f"{path}.{name}".lstrip("."), member


def _inner_lists(module: nn.Module) -> list[str]:
    """The outermost lists and sequences inside of a module; "" for the module itself."""
    if isinstance(module, nn.ModuleList | nn.Sequential):
        return [""]
    found = list[str]()
    for name, inner in module.named_modules():
        inside = any(name.startswith(f"{path}.") for path in found)
        if name and not inside and isinstance(inner, nn.ModuleList | nn.Sequential):
            found.append(name)
    return found


def _chained(blocks: Sequence[_Ran]) -> list[list[_Ran]]:
    """The chains of blocks of which each takes what the one before returned.

    A module that reads the stream beside the next block of the same list is another chain, such as
    Qwen3-Omni's mergers.
    """
    chains = list[list[_Ran]]()
    for index, ran in enumerate(blocks):
        before = next((chain for chain in chains if chain[-1].output is ran.stream), None)
        if before is None or _branches(ran, before[-1], blocks[index + 1 :]):
            chains.append([ran])
        else:
            before.append(ran)
    return chains


def _branches(ran: _Ran, last: _Ran, later: Sequence[_Ran]) -> bool:
    """True if ``ran`` is of another list than ``last``, whose own list goes on with its output."""
    own = last.name.rpartition(".")[0]
    readers = [ran, *(each for each in later if each.stream is last.output)]
    lists = [each.name.rpartition(".")[0] for each in readers]
    return lists[0] != own and own in lists


def _near(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    largest = float(other.abs().max()) if other.numel() else 0.0
    return bool(torch.allclose(one, other, rtol=0, atol=_SAME * largest, equal_nan=True))


def _named(chains: Sequence[Sequence[str]]) -> Iterator[tuple[str, list[str]]]:
    """The chains with the names of their stacks."""
    count = dict[str, int]()
    for chain in chains:
        name = _name(chain[0])
        count[name] = count.get(name, 0) + 1
        yield (name if count[name] == 1 else f"{name}-{count[name]}"), list(chain)


def _name(path: str) -> str:
    """The name of the stack that begins with a block at ``path``."""
    for name, words in _KINDS.items():
        if any(word in part for part in path.split(".") for word in words):
            return name
    parts = [part for part in path.split(".")[:-1] if not part.isdigit() and part not in _GENERAL]
    return parts[-1].replace("_", "-") if parts else "encoder"
