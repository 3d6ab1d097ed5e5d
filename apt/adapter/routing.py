"""The choices of a router: the experts of each token, and their weights.

The experts of transformers are modules whose arguments are the tokens, the indices of the experts
of each token, and the weights of these experts. So the choices of every kind of router can be read
at the call of the experts.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from apt.adapter.weight_tap import factors_of
from apt.errors import AptError


@dataclass(frozen=True)
class Routing:
    """The choices of a router in one forward.

    Attributes:
        inputs: the inputs (tokens, hidden) of the experts.
        index: the indices (tokens, picked) of each token's experts; an index outside the experts is
            an unused choice.
        weights: the factors (tokens, picked) of the outputs of these experts.
    """

    inputs: Tensor
    index: Tensor
    weights: Tensor

    def tokens_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """The indices of an expert's tokens and their weights, in the order of its inputs.

        An expert multiplies its tokens in the order of the picks: the tokens that picked it first
        come before the others.
        """
        picks, tokens = self.index.T.eq(expert).nonzero().T
        return tokens, self.weights[tokens, picks]


_ARGUMENTS = 3  # of experts: the tokens, the indices and the weights
Observer = Callable[[Routing], None]


@contextmanager
def routings(experts: nn.Module, sink: Observer) -> Iterator[None]:
    """Inside the context, pass the routing of every call of the experts to ``sink``.

    Args:
        experts: the module that owns the stacked weights of the experts.
        sink: called before the experts run.

    Raises:
        AptError: the module has no arguments for indices and weights. For example, the experts of
            Llama 4 multiply every token, and experts in a list are called one by one.
    """
    names = list(inspect.signature(experts.forward).parameters)
    if len(names) < _ARGUMENTS:
        raise _unsupported_error(experts)

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = [*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs)]
        sink(_routing(module, arguments))

    handle = experts.register_forward_pre_hook(read, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _unsupported_error(experts: nn.Module) -> AptError:
    return AptError(f"{type(experts).__name__} does not get the indices of each token's experts")


def _routing(experts: nn.Module, arguments: list[Any]) -> Routing:
    """The routing in the arguments of experts."""
    if (
        not all(isinstance(argument, Tensor) for argument in arguments[:_ARGUMENTS])
        or len(arguments) < _ARGUMENTS
    ):
        raise _unsupported_error(experts)
    inputs, index, weights = (argument.detach() for argument in arguments[:_ARGUMENTS])
    index = index.reshape(-1, index.shape[-1])
    weights = weights.reshape(len(index), -1)
    if weights.shape != index.shape:  # weights of all experts, in older releases of transformers
        weights = weights.gather(1, index)
    return Routing(inputs.reshape(-1, inputs.shape[-1]), index, weights)


class Unrouted(TorchFunctionMode):
    """While entered, routers never choose the removed experts.

    The products with a router's weight are −∞ for these experts. A correction that is added later
    could raise the scores again, so they are set to −∞ at the following selection as well.

    Args:
        removed: the mask of the removed experts, (experts,) or (tokens, experts), by the weight
            (experts, hidden) of each router.
    """

    def __init__(self, removed: Mapping[Tensor, Tensor]) -> None:
        super().__init__()
        self._removed = {id(weight): mask for weight, mask in removed.items()}
        self._alive = list(removed)  # while they exist, no other tensor has their ids
        self._current: tuple[int, Tensor] | None = None  # tokens and mask of the last router

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, without the removed experts."""
        kwargs = kwargs or {}
        if func in _SELECTIONS and self._current is not None:
            args = (_without(args[0], *self._current), *args[1:])
        result = func(*args, **kwargs)
        if func in _COPIES and id(args[0]) in self._removed:
            self._removed[id(result)] = self._removed[id(args[0])]
            self._alive.append(result)
        for factor in factors_of(func, args, kwargs):
            if id(factor) in self._removed:
                mask = self._removed[id(factor)]
                self._current = (result.numel() // mask.shape[-1], mask)
                result = _without(result, *self._current)
        return result


_SELECTIONS = {torch.topk, Tensor.topk}
_TRANSPOSED: Any = Tensor.T
_COPIES = {
    Tensor.to, Tensor.type, Tensor.float, Tensor.t, Tensor.transpose, _TRANSPOSED.__get__
}  # fmt: skip


def _without(scores: Tensor, tokens: int, removed: Tensor) -> Tensor:
    """Scores of all experts for each token, in any shape, that are −∞ for the removed experts.

    Other tensors, such as the scores of groups of experts, are returned as they are.
    """
    if scores.numel() != tokens * removed.shape[-1]:
        return scores
    rows = scores.reshape(tokens, -1).masked_fill(removed, -torch.inf)
    return rows.view(scores.shape)
