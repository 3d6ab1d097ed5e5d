"""Recording of block calls: one run of the model over stubs in place of its blocks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter.sites import Call
from apt.errors import AptError

_STATE = "hidden_states"


class _LastBlock(Exception):
    """Ends a recording run: what comes after the blocks is not needed."""


def record_calls(
    model: nn.Module, blocks: Sequence[nn.Module], tokens: Tensor
) -> tuple[Tensor, list[Call]]:
    """Run ``model`` once with every block stubbed, recording each block's own call.

    So blocks of different kinds get their own masks and positions.

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
        (state,) = passed = passed_on(args, kwargs)
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


def passed_on(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor]:
    """What a block's stub returns that was called so: its input, in a tuple.

    A model whose blocks return tuples takes it out, any other hands the tuple to the next stub,
    which takes it out there. So no stub needs to know what its block returns.
    """
    state = args[0] if args else kwargs[_STATE]
    return (state[0] if isinstance(state, tuple) else state,)


@contextmanager
def stubbed(blocks: Sequence[nn.Module], stub: Callable[..., Any]) -> Iterator[None]:
    """While entered, ``stub`` is called in place of each of the blocks.

    A block that has a ``forward`` of its own, as accelerate gives it, gets that back.
    """
    own = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = stub
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
