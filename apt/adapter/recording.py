"""The recording of block calls: one run of the model with stubs in place of its blocks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter.sites import Call
from apt.errors import AptError

_STATE = "hidden_states"


class _LastBlock(Exception):
    """Ends a recording run at the last block."""


def record_calls(
    model: nn.Module, blocks: Sequence[nn.Module], tokens: Tensor
) -> tuple[Tensor, list[Call]]:
    """Run ``model`` once with every block stubbed, and record the call of each block.

    Blocks of different kinds thus keep their own masks and positions.

    Args:
        model: a transformers model.
        blocks: its blocks, in the order in which it calls them.
        tokens: token ids (samples, seqlen).

    Returns:
        The state before the first block (samples, seqlen, hidden) and one call for each block.
    """
    states: list[Tensor] = []
    calls: list[Call] = []

    def stub(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        (state,) = passed = stub_output(args, kwargs)
        states.append(state)
        given = {name: value for name, value in kwargs.items() if args or name != _STATE}
        calls.append(Call(args[1:], given, None if args else _STATE))
        if len(calls) == len(blocks):
            raise _LastBlock
        return passed

    with stubbed(blocks, stub), torch.no_grad():
        try:
            base: Any = model.base_model
            base(tokens, use_cache=False)
        except _LastBlock:
            return states[0], calls
    raise AptError(f"{type(model).__name__} called {len(calls)} of its {len(blocks)} blocks")


def stub_output(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor]:
    """The output of a stub that is called with these arguments: its input state, in a tuple.

    A model whose blocks return tuples unpacks it. Any other model passes the tuple to the next
    stub, which unpacks it. So a stub need not know the return type of its block.
    """
    state = args[0] if args else kwargs[_STATE]
    return (state[0] if isinstance(state, tuple) else state,)


@contextmanager
def stubbed(blocks: Sequence[nn.Module], stub: Callable[..., Any]) -> Iterator[None]:
    """Inside the context, ``stub`` is called in place of each of ``blocks``.

    An instance attribute ``forward`` of a block, as accelerate sets it, is restored on exit.
    """
    own = {block: vars(block).get("forward") for block in blocks}
    for block in own:
        block.forward = stub
    try:
        yield
    finally:
        for block, forward in own.items():
            del block.forward
            if forward is not None:
                block.forward = forward


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set ``model`` to eval mode inside the context; restore the mode of every module on exit."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was in training:
            module.training = was
