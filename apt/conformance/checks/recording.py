"""The inputs and outputs of a model's blocks, recorded by hooks in a plain forward."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Passed:
    """An input or output of a block: the stream is one tensor, or the sum of two tensors."""

    first: Tensor
    whole: Tensor | None = None

    def is_stream(self, tensor: Tensor) -> bool:
        """True if ``tensor`` is the residual stream."""
        parts = (self.first, self.whole)
        return any(same(tensor, part) for part in parts if part is not None)


@dataclass
class Recording:
    """The input and the output of each call of a block, in order."""

    inputs: list[Passed] = field(default_factory=list)
    outputs: list[Passed] = field(default_factory=list)


@torch.no_grad()
def record(model: nn.Module, blocks: Sequence[nn.Module], tokens: Tensor) -> Recording:
    """The inputs and outputs of ``blocks`` when ``model`` runs on ``tokens`` (samples, seqlen)."""
    recording = Recording()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording.inputs.append(_passed(args or tuple(kwargs.values())))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        recording.outputs.append(_passed(output))

    distinct = dict.fromkeys(blocks)  # a block may be in the list several times
    handles = [b.register_forward_pre_hook(before, with_kwargs=True) for b in distinct]
    handles += [b.register_forward_hook(after) for b in distinct]
    with removed(handles):
        uncached(model, tokens)
    return recording


def uncached(model: nn.Module, tokens: Tensor) -> Any:
    """The output of a model without a cache.

    With a cache, keys have another layout in memory. With torch 2.6 the products of attention then
    differ in the last bit.
    """
    parameters = signature(model.forward).parameters.values()
    accepted = any(p.name == "use_cache" or p.kind is Parameter.VAR_KEYWORD for p in parameters)
    return model(tokens, use_cache=False) if accepted else model(tokens)


@contextmanager
def removed(handles: Sequence[Any]) -> Iterator[None]:
    """Remove hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _passed(value: Any) -> Passed:
    first = first_tensor(value).clone()
    second = value[1] if isinstance(value, tuple) and len(value) > 1 else None
    if isinstance(second, Tensor) and second.shape == first.shape:
        return Passed(first, first + second)
    return Passed(first)


def near(tensor: Tensor, expected: Tensor, share: float = 1e-4) -> bool:
    """True if the distance of two tensors is at most ``share`` of the norm."""
    distance = (tensor.double() - expected.double()).norm()
    return bool(distance <= share * expected.double().norm().clamp(min=1e-12))


def first_tensor(value: Any) -> Tensor:
    """The first tensor in a state, a tuple or a mapping; raises `TypeError` if it has no tensor."""
    item = value
    while not isinstance(item, Tensor):
        try:
            item = next(iter(item.values() if isinstance(item, dict) else item))
        except (TypeError, StopIteration):
            raise TypeError(f"no tensor in a state that is {value!r}") from None
    return item


def same(tensor: Tensor, expected: Tensor) -> bool:
    """True if two tensors have the same shape and values, whatever their dtypes."""
    return tensor.shape == expected.shape and bool((tensor == expected).all())
