"""The experts of a block on calibration tokens: what they compute, and what the router chooses."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Groups, Routing, State, Unrouted, routings
from apt.adapter.groups import tensors_of
from apt.calibration.batches import Batch, OpenBlock
from apt.calibration.dense_activations import mean_squares, stream_rows
from apt.calibration.sources import RoutedBySource

_TOKENS = 4096
_OUTPUTS = 2**28  # elements of the outputs of all experts: 1 GiB


class _Routed(Exception):
    """Ends a run of a block when its router has chosen."""


@dataclass(frozen=True)
class _Run:
    """The last call of a router, or else of a part of a block with the router, on one batch.

    Attributes:
        call: the call.
        tokens: the number of tokens of the batch.
        chosen: the positions of the indices and of the weights in what the router returns; None if
            they are only known when the experts are called.
    """

    call: Callable[[], Any]
    tokens: int
    chosen: tuple[int, int] | None = None


class RoutedExperts:
    """The experts of a block, on some calibration tokens.

    If several processes prune together, each has its own tokens, and all must make the same calls.

    Attributes:
        count: the number of experts.
        routing: what the router decides on these tokens.
        sizes: the mean square of each token (tokens,) on the stream after the block. Errors are
            divided by it, since the norm before the next block divides the stream by its root.
        few: the number of tokens for which the outputs of all experts fit into 1 GiB.
        by_source: the tokens of each expert, and their weights, by the source of the text.

    Args:
        block: the block with its dense weights, and the batches before it.
        groups: its experts.

    Raises:
        AptError: the module of the experts does not get the indices of each token's experts.
    """

    def __init__(self, block: OpenBlock, groups: Groups) -> None:
        self.count = groups.count
        path = owner_of(groups)
        self._experts: Any = block.module.get_submodule(path)
        self._routers = routers_of(block.module, groups)
        self._runs, found, sizes = list[_Run](), list[Routing](), list[Tensor]()
        width = block.adapter.residual(block.batches[0].state).shape[-1]
        self._ranks = block.ranks
        self.by_source = RoutedBySource(block.sources, groups.count)
        for batch in block.first_batches(_TOKENS * block.mixed / block.ranks.size):
            after = self._record(block, batch, path.rpartition(".")[0], found)
            sizes.append(mean_squares(stream_rows(block.adapter, after)).squeeze(1))
            self.by_source.add(found[-1], batch.token_sources())
            block.progress()
        self.by_source.over_ranks(block.ranks)
        self.routing, self.sizes = _joined(found), torch.cat(sizes)
        self.few = min(len(self.sizes), max(1, _OUTPUTS // (groups.count * width)))

    def _record(self, block: OpenBlock, batch: Batch, part: str, found: list[Routing]) -> State:
        """Run a batch, and record how its routing is computed again; returns the state after it."""
        run = partial(block.step, batch, batch.state)
        router = _owner(block.module, self._routers[0])
        around = block.module.get_submodule(part)
        with (
            _calls(around) as whole,
            _calls(router) as alone,
            routings(self._experts, found.append),
        ):
            after = run()
        tokens, (call, result) = len(found[-1].inputs), alone[-1]
        if (chosen := _positions(result, found[-1])) is not None:
            self._runs.append(_Run(call, tokens, chosen))
        else:
            self._runs.append(_Run(whole[-1][0] if part else run, tokens))
        return after

    def rerouted(self, removed: Tensor) -> Routing:
        """What the router decides if some experts do not exist.

        Args:
            removed: True for these experts, (experts,) or, for each token, (tokens, experts).
        """
        found, rest = list[Routing](), removed.to(self.sizes.device)

        def stop(routing: Routing) -> None:
            found.append(routing)
            raise _Routed

        for run in self._runs:
            mask = rest
            if rest.ndim > 1:
                mask, rest = rest[: run.tokens], rest[run.tokens :]
            masks = dict.fromkeys(self._routers, mask)
            with suppress(_Routed), routings(self._experts, stop), Unrouted(masks):
                result = run.call()
                if run.chosen is not None:
                    index, weights = (result[place] for place in run.chosen)
                    found.append(Routing(self.routing.inputs, index, weights))
        return replace(_joined(found), inputs=self.routing.inputs)

    @cached_property
    def outputs(self) -> Tensor:
        """The output of every expert for the first tokens (experts, few, hidden), in fp32."""
        inputs = self.routing.inputs[: self.few]
        return torch.stack([self._output_of(e, inputs).float() for e in range(self.count)])

    def _output_of(self, expert: int, inputs: Tensor) -> Tensor:
        """The output (tokens, hidden) of one expert, without a weight of the router."""
        index = torch.full((len(inputs), 1), expert, device=inputs.device)
        out: Tensor = self._experts(inputs, index, inputs.new_ones(len(inputs), self.count))
        return out.view(inputs.shape)

    def output(self, routing: Routing) -> Tensor:
        """The sum (few, hidden) of the outputs of the chosen experts by their weights."""
        tokens = torch.arange(self.few, device=self.sizes.device)
        total = torch.zeros_like(self.outputs[0])
        for index, weights in zip(routing.index.T, routing.weights.T, strict=True):
            total += self.outputs[index[: self.few], tokens] * weights[: self.few].unsqueeze(1)
        return total

    def norms(self) -> Tensor:
        """The weight of each pick times the norm of the expert's output (tokens, picked)."""
        norms = torch.zeros(self.routing.index.shape, device=self.sizes.device)
        for expert in range(self.count):  # on its own tokens alone, unlike `outputs`
            own = self.routing.index == expert
            inputs = self.routing.inputs[own.any(1)]
            if len(inputs):
                norms[own] = self._output_of(expert, inputs).float().norm(dim=1)
        return norms * self.routing.weights.float().abs()

    def sums(self, values: Tensor) -> Tensor:
        """The sums (experts,) of values of picks (tokens, picked), over the tokens of all ranks."""
        zeros = torch.zeros(self.count, dtype=torch.float64, device=values.device)
        return self.over_ranks(
            zeros.index_add(0, self.routing.index.flatten(), values.flatten().double())
        )

    def over_ranks(self, sums: Tensor) -> Tensor:
        """The sums over all ranks, of those over this rank's tokens; in place."""
        self._ranks.add(sums)
        return sums


def owner_of(groups: Groups) -> str:
    """The path within a block of the module that owns the weights of its experts."""
    return groups.members or groups.outputs[0].parameter.rpartition(".")[0]


def routers_of(block: nn.Module, groups: Groups) -> list[Tensor]:
    """The weights of the router of some experts."""
    inside, tensors = f"{owner_of(groups)}.", tensors_of(block)
    rows = [part.parameter for part in groups.parts if part.dim == 0]
    beside = [tensors[path] for path in rows if not path.startswith(inside)]
    return [tensor for tensor in beside if tensor.ndim == 2]


@contextmanager
def _calls(module: nn.Module) -> Iterator[list[tuple[Callable[[], Any], Any]]]:
    """Inside the context, record the calls of a module, each with its result."""
    calls = list[tuple[Callable[[], Any], Any]]()

    def record(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        calls.append((partial(module, *args, **kwargs), result))

    handle = module.register_forward_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _owner(block: nn.Module, parameter: Tensor) -> nn.Module:
    """The module that owns a parameter."""
    modules = block.modules()
    return next(m for m in modules if any(p is parameter for p in m.parameters(recurse=False)))


def _positions(result: Any, routing: Routing) -> tuple[int, int] | None:
    """The positions of a routing's indices and weights in what a router returns."""
    places = list[int]()
    for wanted in (routing.index, routing.weights):
        for place, each in enumerate(result if isinstance(result, tuple) else ()):
            if isinstance(each, Tensor) and _same(each, wanted):
                places.append(place)
                break
    return (places[0], places[1]) if len(places) == 2 else None


def _same(left: Tensor, right: Tensor) -> bool:
    """True if two tensors are one in memory."""
    return (left.data_ptr(), left.shape, left.dtype) == (right.data_ptr(), right.shape, right.dtype)


def _joined(parts: Sequence[Routing]) -> Routing:
    """The routing of several batches as one."""
    return Routing(
        torch.cat([part.inputs for part in parts]),
        torch.cat([part.index for part in parts]),
        torch.cat([part.weights for part in parts]),
    )
