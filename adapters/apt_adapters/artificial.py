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
_LARGE = 1 << 20  # values of a table


def kind_of(block: nn.Module) -> Any:
    """The type and the parameter shapes of a block: equal for blocks of the same kind."""
    shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
    return type(block), shapes


def few_tokens(model: nn.Module) -> Tensor:
    """Token ids (2, 8) for a run of the model."""
    return torch.arange(16, device=next(model.parameters()).device).view(2, 8)


def text_part(model: nn.Module, path: str, blocks: Sequence[nn.Module]) -> tuple[str, set[int]]:
    """The part of a model that runs on text alone, and the blocks that it then calls.

    The part is the model itself, unless the model needs another input such as an image. Then it is
    a submodule around the blocks that generates text itself. Layers for images may not be called.

    Args:
        path: the path of the list of blocks.

    Returns:
        The path of the part, "" for the model, and the indices of the blocks.
    """
    names = path.split(".")
    inner = (".".join(names[:count]) for count in range(1, len(names)))
    parts = ["", *(p for p in inner if isinstance(model.get_submodule(p), GenerationMixin))]
    failures, results = list[Exception](), list[tuple[str, set[int]]]()
    for part in parts:
        module = model.get_submodule(part)
        try:
            results.append((part, _called(module, blocks, few_tokens(model))))
        except Exception as error:
            failures.append(error)
        else:
            if part == parts[-1] or _ends(module, blocks, few_tokens(model)):
                return results[-1]
    if not results:
        raise failures[0]
    return results[0]


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
    adapter: Adapter,
    blocks: Sequence[tuple[str, nn.Module]],
    first_stream: Tensor,
    calls: list[Call],
) -> Iterator[tuple[str, nn.Module, State, Call]]:
    state: State = first_stream
    draw = torch.Generator().manual_seed(0)  # a router sends tokens of zeros to no expert
    for (name, block), call in zip(blocks, calls, strict=True):
        stream = torch.randn(first_stream.shape, generator=draw).to(first_stream)
        state_before = (stream, *state[1:]) if isinstance(state, tuple) else stream
        yield name, block, state_before, call
        if call.passes:
            with torch.no_grad(), one_by_one(block):
                state = adapter.step(block, state_before, call)


def with_values(model: nn.Module, known: Mapping[int, Tensor] | None = None) -> nn.Module:
    """The model, or a copy on the CPU with values for its parts on the meta device.

    A model needs values to run, for example to decide whether a mask is needed. Zeros that are
    never read need no memory.

    Args:
        known: tensors of the copy by the ``id`` of the model's tensors; all others are zeros.
    """
    if not _on_meta(model):
        return model
    values: dict[int, Any] = dict(known or {})
    for module in model.modules():
        plain = (value for value in vars(module).values() if isinstance(value, Tensor))
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False), *plain)
        values |= {id(tensor): _valued(tensor) for tensor in tensors if id(tensor) not in values}
    return copy.deepcopy(model, values)


def with_distinct_values(model: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
    """The same as `with_values`, but the first block of each kind has random, distinct values.

    The other blocks share these values: with zeros, their routers would send no token to an expert.
    """
    if not _on_meta(model):
        return model
    draw, values = torch.Generator().manual_seed(0), dict[int, Tensor]()
    of_kind: dict[Any, dict[str, Tensor]] = {}
    for block in blocks:
        parameters = dict(block.named_parameters())
        if (kind := kind_of(block)) not in of_kind:
            of_kind[kind] = {
                path: _random(parameter, draw) for path, parameter in parameters.items()
            }
        values |= {
            id(parameters[path]): _parameter(tensor) for path, tensor in of_kind[kind].items()
        }
    return with_values(model, values)


def with_random_values(model: nn.Module) -> nn.Module:
    """The model, or a copy on the CPU with random values for its parts on the meta device.

    The blocks of a kind share their values, and the rows of large tensors are equal.
    """
    if not _on_meta(model):
        return model
    draw, values, of_kind = torch.Generator().manual_seed(0), dict[int, Any](), dict[Any, Any]()
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for block in (member for module in lists for member in module if member is not None):
        parameters = dict(block.named_parameters())
        first = of_kind.setdefault(
            kind_of(block), {path: _random(tensor, draw) for path, tensor in parameters.items()}
        )
        for path, tensor in parameters.items():
            values.setdefault(id(tensor), _parameter(first[path]))
    for tensor in model.parameters():
        if tensor.is_meta and id(tensor) not in values:
            values[id(tensor)] = _parameter(_repeated(tensor, draw))
    return with_values(model, values)


def _repeated(parameter: Tensor, draw: torch.Generator) -> Tensor:
    """Random values for a parameter; a large table repeats one row, which needs no memory."""
    if parameter.numel() < _LARGE or parameter.ndim < 2:
        return _random(parameter, draw)
    row = torch.randn(parameter.shape[-1], generator=draw) * _SPREAD
    return row.to(parameter.dtype).expand(parameter.shape)


def _on_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _valued(tensor: Tensor) -> Tensor:
    """The tensor on the CPU; zeros of the same shape and dtype if it is on the meta device."""
    values = _zeros(tensor) if tensor.is_meta else tensor.detach().cpu()
    return _parameter(values) if isinstance(tensor, nn.Parameter) else values


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _random(parameter: Tensor, draw: torch.Generator) -> Tensor:
    """Random values for a parameter of a block."""
    values = torch.randn(parameter.shape, generator=draw) * _SPREAD
    return (values if parameter.ndim > 1 else values + 1).to(parameter.dtype)


def _zeros(tensor: Tensor) -> Tensor:
    """Zeros whose memory pages the operating system allocates only when they are written."""
    size = max(1, tensor.numel()) * tensor.element_size()
    untouched = torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(tensor.dtype)
    return untouched[: tensor.numel()].view(tensor.shape)
