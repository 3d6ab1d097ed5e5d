"""Models with artificial values for the weights that are not in memory."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from apt.adapter import (
    Adapter,
    Call,
    State,
    one_by_one,
    passed_state,
    record_calls,
    stub_output,
    stubbed,
)
from apt.adapter.recording import UncalledError
from apt.conformance.checks.recording import uncached

_SPREAD = 0.05  # standard deviation of random values


def kind_of(block: nn.Module) -> Any:
    """The type and the parameter shapes of a block: equal for blocks of the same kind."""
    shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
    return type(block), shapes


def few_tokens(model: nn.Module) -> Tensor:
    """Token ids (2, 8) for a run of the model."""
    return torch.arange(16, device=next(model.parameters()).device).view(2, 8)


def text_part(model: nn.Module, path: str, blocks: Sequence[nn.Module]) -> tuple[str, set[int]]:
    """The part of a model that runs on text alone, and the blocks that it then calls.

    That is the model, or a part around the blocks that writes text itself, if the model needs an
    image for example. Layers that look at an image may not be called.

    Args:
        path: the path of the list of blocks.

    Returns:
        The path of the part, "" for the model, and the indices of the blocks.
    """
    names = path.split(".")
    inner = (".".join(names[:count]) for count in range(1, len(names)))
    parts = ["", *(p for p in inner if isinstance(model.get_submodule(p), GenerationMixin))]
    failures, found = list[Exception](), list[tuple[str, set[int]]]()
    for part in parts:
        module = model.get_submodule(part)
        try:
            found.append((part, _called(module, blocks, few_tokens(model))))
        except Exception as error:
            failures.append(error)
        else:
            if part == parts[-1] or _ends(module, blocks, few_tokens(model)):
                return found[-1]
    if not found:
        raise failures[0]
    return found[0]


def _called(model: nn.Module, blocks: Sequence[nn.Module], tokens: Tensor) -> set[int]:
    """The indices of the blocks that a model calls."""
    try:
        record_calls(model, blocks, tokens)
    except UncalledError as error:
        return set(error.called)
    return set(range(len(blocks)))


def _ends(model: nn.Module, blocks: Sequence[nn.Module], tokens: Tensor) -> bool:
    """True if a model with stubs for its blocks gives an output."""
    for pass_on in (stub_output, lambda args, kwargs, block: passed_state(args, kwargs)):
        with ExitStack() as stack:
            for block in blocks:
                stub = partial(_called_as, pass_on, block)
                stack.enter_context(stubbed([block], stub))
            try:
                uncached(model, tokens)
            except Exception:
                continue
        return True
    return False


def _called_as(stub: Callable[..., Any], block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return stub(args, kwargs, block)


def runs(
    adapter: Adapter, model: nn.Module, blocks: Sequence[tuple[str, nn.Module]]
) -> Iterator[tuple[str, nn.Module, State, Call]]:
    """Each block with its call on a few tokens, and a state of random values."""
    state, calls = record_calls(model, [block for _, block in blocks], few_tokens(model))
    return _runs(adapter, blocks, state, calls)


def _runs(
    adapter: Adapter, blocks: Sequence[tuple[str, nn.Module]], first: Tensor, calls: list[Call]
) -> Iterator[tuple[str, nn.Module, State, Call]]:
    state: State = first
    draw = torch.Generator().manual_seed(0)  # a router gives nothing to tokens of zeros
    for (name, block), call in zip(blocks, calls, strict=True):
        stream = torch.randn(first.shape, generator=draw).to(first)
        before = (stream, *state[1:]) if isinstance(state, tuple) else stream
        yield name, block, before, call
        if call.passes:
            with torch.no_grad(), one_by_one(block):
                state = adapter.step(block, before, call)


def with_values(model: nn.Module, given: Mapping[int, Tensor] | None = None) -> nn.Module:
    """The model, or a copy on the CPU with values for its parts on the meta device.

    A model needs values to run, if only to decide if a mask is needed. Zeros that are never read
    take no memory.

    Args:
        given: the tensors of the copy by the ``id`` of those of the model; zeros for the others.
    """
    if not _on_meta(model):
        return model
    values: dict[int, Any] = dict(given or {})
    for module in model.modules():
        plain = (value for value in vars(module).values() if isinstance(value, Tensor))
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False), *plain)
        values |= {id(tensor): _valued(tensor) for tensor in own if id(tensor) not in values}
    return copy.deepcopy(model, values)


def with_distinct_values(model: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
    """The same as `with_values`, but the first block of each kind has random, distinct values.

    The others share them: they would send nothing to their experts with zeros.
    """
    if not _on_meta(model):
        return model
    draw, values = torch.Generator().manual_seed(0), dict[int, Tensor]()
    first: dict[Any, dict[str, Tensor]] = {}
    for block in blocks:
        own = dict(block.named_parameters())
        if (kind := kind_of(block)) not in first:
            first[kind] = {path: _random(parameter, draw) for path, parameter in own.items()}
        values |= {id(own[path]): _parameter(tensor) for path, tensor in first[kind].items()}
    return with_values(model, values)


def _on_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _valued(tensor: Tensor) -> Tensor:
    """The tensor on the CPU; zeros of the same shape and dtype if it is on the meta device."""
    found = _zeros(tensor) if tensor.is_meta else tensor.detach().cpu()
    return _parameter(found) if isinstance(tensor, nn.Parameter) else found


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _random(like: Tensor, draw: torch.Generator) -> Tensor:
    """Random values in place of those of a parameter of a block."""
    values = torch.randn(like.shape, generator=draw) * _SPREAD
    return (values if like.ndim > 1 else values + 1).to(like.dtype)


def _zeros(like: Tensor) -> Tensor:
    """Zeros whose memory pages the operating system allocates only when they are written."""
    size = max(1, like.numel()) * like.element_size()
    untouched = torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(like.dtype)
    return untouched[: like.numel()].view(like.shape)
