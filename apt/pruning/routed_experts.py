"""The experts of a block on calibration tokens: their outputs, and the router's choices."""

import math
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


def batches_to_judge(block: OpenBlock, least: int) -> int:
    """The number of batches that the choice of experts may read."""
    first = block.first_batches(_TOKENS * block.mixed / block.ranks.size)
    return len(block.batches) if least else len(first)


_OUTPUTS = 2**28  # elements of the outputs of all experts: 1 GiB


class _Routed(Exception):
    """Ends a run of a block when its router has chosen."""


@dataclass(frozen=True)
class _RouterCall:
    """A call that computes the routing of one batch: of the router, or of a module around it.

    Attributes:
        call: the call.
        tokens: the number of tokens of the batch.
        positions: the positions of the indices and the weights in the output of the router. None if
            the routing is known only when the experts are called.
    """

    call: Callable[[], Any]
    tokens: int
    positions: tuple[int, int] | None = None


class RoutedExperts:
    """The experts of a block, on some calibration tokens.

    If several processes prune together, each has its own tokens, and all must make the same calls.

    Attributes:
        count: the number of experts.
        routing: the routing of these tokens.
        judged: the routing with more picks: an expert with fewer than ``least`` tokens is also
            judged on further tokens. Of all tokens that are not sent to it, these are the tokens
            for which its router weight is largest. It has ``least`` tokens then, if there are as
            many.
        underserved: the experts with fewer than ``least`` tokens.
        protected: the mask (experts,) of the experts that a choice must not remove, on the CPU;
            None if it may remove all.
        sizes: the mean square of each token (tokens,) on the stream after the block. Squared errors
            are divided by it, as the norm before the next block divides the stream by its root.
        few: the number of tokens for which the outputs of all experts fit into 1 GiB.
        by_source: the tokens of each expert, and their weights, by the source of the text.

    Args:
        block: the block with its dense weights, and the batches before it.
        groups: its experts.
        least: the number of tokens that each expert should have. As long as one has fewer, further
            batches are read.

    Raises:
        AptError: the module of the experts does not get the indices of each token's experts.
    """

    def __init__(self, block: OpenBlock, groups: Groups, least: int = 0) -> None:
        self.count = groups.count
        path = owner_of(groups)
        self._experts: Any = block.module.get_submodule(path)
        self._routers = routers_of(block.module, groups)
        self._runs, recorded, sizes = list[_RouterCall](), list[Routing](), list[Tensor]()
        width = block.adapter.residual(block.batches[0].state).shape[-1]
        self._ranks = block.ranks
        self.by_source = RoutedBySource(block.sources, groups.count)
        self.protected: Tensor | None = None
        for batch in self._batches(block, least):
            state = self._record(block, batch, path.rpartition(".")[0], recorded)
            sizes.append(mean_squares(stream_rows(block.adapter, state)).squeeze(1))
            self.by_source.add(recorded[-1], batch.token_sources())
            block.progress()
        self.by_source.over_ranks(block.ranks)
        self.routing, self.sizes = _concatenated(recorded), torch.cat(sizes)
        self.few = min(len(self.sizes), max(1, _OUTPUTS // (groups.count * width)))
        self.underserved, self.judged = tuple[int, ...](), self.routing
        if least:
            tokens = self.by_source.tokens.sum(0)
            self.underserved = tuple((tokens < least).nonzero().squeeze(1).tolist())
            self.judged = self._with_nearest(least - tokens)

    def _batches(self, block: OpenBlock, least: int) -> Iterator[Batch]:
        """The first batches, and further ones while an expert has fewer than ``least`` tokens."""
        first = block.first_batches(_TOKENS * block.mixed / block.ranks.size)
        yield from first
        longest = max(block.ranks.gather(len(block.batches))) if least else 0
        for number in range(len(first), longest):
            served = self.by_source.tokens.sum(0)
            block.ranks.add(served)
            if float(served.min()) >= least:
                return
            yield from block.batches[number : number + 1]  # a rank may have one less

    def _with_nearest(self, missing: Tensor) -> Routing:
        """The routing with more picks for experts that lack tokens, ``missing`` (experts,)."""
        index, weights = [self.routing.index], [self.routing.weights]
        for expert in self.underserved:
            weight = self._weight_of(expert)
            share = math.ceil(int(missing[expert]) / self._ranks.size)
            nearest = weight.topk(min(share, len(weight))).indices
            nearest = nearest[weight[nearest] > 0]
            picks = torch.full_like(self.routing.index[:, :1], self.count)
            picks[nearest] = expert
            index.append(picks)
            weights.append((weight * (picks.squeeze(1) == expert)).unsqueeze(1))
        return Routing(self.routing.inputs, torch.cat(index, 1), torch.cat(weights, 1))

    def _weight_of(self, expert: int) -> Tensor:
        """The router weight of an expert (tokens,) for tokens that are not sent to it; else 0.

        It is read from a run of the router that must choose the expert in place of the last pick
        of each token, on the scale on which the first pick has the weight that it has.
        """
        routing, tokens = self.routing, torch.arange(len(self.sizes), device=self.sizes.device)
        first, last = routing.weights.argmax(1), routing.weights.argmin(1)
        left = torch.zeros(len(tokens), self.count, dtype=torch.bool, device=tokens.device)
        if routing.index.shape[1] > 1:
            left[tokens.unsqueeze(1), routing.index] = True
            left[tokens, routing.index[tokens, last]] = False
        left[:, expert] = True
        other = self.rerouted(~left)
        weight = (other.weights * (other.index == expert)).sum(1).float()
        before = routing.weights[tokens, first].float()
        same = other.index == routing.index[tokens, first].unsqueeze(1)
        now = (other.weights * same).sum(1).float()
        scale = torch.where(now > 0, before / now, torch.ones_like(now))
        weight = (weight * scale).nan_to_num(0.0, 0.0, 0.0).to(routing.weights.dtype)
        return weight.masked_fill((routing.index == expert).any(1), 0.0)

    def _record(
        self, block: OpenBlock, batch: Batch, outer_path: str, recorded: list[Routing]
    ) -> State:
        """Run a batch and record the call that computes its routing; returns the state after it."""
        run = partial(block.step, batch, batch.state)
        router = _module_of(block.module, self._routers[0])
        outer = block.module.get_submodule(outer_path)
        with (
            _calls(outer) as outer_calls,
            _calls(router) as router_calls,
            routings(self._experts, recorded.append),
        ):
            state = run()
        tokens, (call, result) = len(recorded[-1].inputs), router_calls[-1]
        if (positions := _positions(result, recorded[-1])) is not None:
            self._runs.append(_RouterCall(call, tokens, positions))
        else:
            self._runs.append(_RouterCall(outer_calls[-1][0] if outer_path else run, tokens))
        return state

    def rerouted(self, removed: Tensor) -> Routing:
        """The routing without some experts.

        Args:
            removed: the mask of these experts: (experts,), or (tokens, experts) for each token.
        """
        recorded, rest = list[Routing](), removed.to(self.sizes.device)

        def stop(routing: Routing) -> None:
            recorded.append(routing)
            raise _Routed

        for run in self._runs:
            mask = rest
            if rest.ndim > 1:
                mask, rest = rest[: run.tokens], rest[run.tokens :]
            masks = dict.fromkeys(self._routers, mask)
            with suppress(_Routed), routings(self._experts, stop), Unrouted(masks):
                result = run.call()
                if run.positions is not None:
                    index, weights = (result[place] for place in run.positions)
                    recorded.append(Routing(self.routing.inputs, index, weights))
        return replace(_concatenated(recorded), inputs=self.routing.inputs)

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
        """The weight of each pick of `judged` times the norm of the expert's output."""
        index = self.judged.index
        norms = torch.zeros(index.shape, device=self.sizes.device)
        for expert in range(self.count):  # on its own tokens alone, unlike `outputs`
            picked = index == expert
            inputs = self.routing.inputs[picked.any(1)]
            if len(inputs):
                norms[picked] = self._output_of(expert, inputs).float().norm(dim=1)
        return norms * self.judged.weights.float().abs()

    def sums(self, values: Tensor) -> Tensor:
        """The sums (experts,) of values of picks (tokens, picked), over the tokens of all ranks.

        The values belong to the picks of `routing`, or of `judged`, which may have more picks.
        """
        index = self.routing.index
        if values.shape != index.shape:
            index = self.judged.index
        zeros = torch.zeros(self.count + 1, dtype=torch.float64, device=values.device)
        return self.over_ranks(
            zeros.index_add(0, index.flatten(), values.flatten().double())[: self.count]
        )

    def over_ranks(self, sums: Tensor) -> Tensor:
        """Add up sums over this rank's tokens over all ranks, in place."""
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


def _module_of(block: nn.Module, parameter: Tensor) -> nn.Module:
    """The module that owns a parameter."""
    modules = block.modules()
    return next(m for m in modules if any(p is parameter for p in m.parameters(recurse=False)))


def _positions(result: Any, routing: Routing) -> tuple[int, int] | None:
    """The positions of a routing's indices and weights in the output of a router."""
    positions = list[int]()
    for tensor in (routing.index, routing.weights):
        for position, value in enumerate(result if isinstance(result, tuple) else ()):
            if isinstance(value, Tensor) and _same_memory(value, tensor):
                positions.append(position)
                break
    return (positions[0], positions[1]) if len(positions) == 2 else None


def _same_memory(left: Tensor, right: Tensor) -> bool:
    """True if two tensors share their memory."""
    return (left.data_ptr(), left.shape, left.dtype) == (right.data_ptr(), right.shape, right.dtype)


def _concatenated(parts: Sequence[Routing]) -> Routing:
    """The routing of several batches, concatenated."""
    return Routing(
        torch.cat([part.inputs for part in parts]),
        torch.cat([part.index for part in parts]),
        torch.cat([part.weights for part in parts]),
    )
