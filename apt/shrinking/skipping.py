"""A model that runs without some of its blocks, and the calibration loss of such a model."""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from apt.adapter import Adapter, passed_state, stubbed
from apt.evaluation.metrics import perplexity


@contextmanager
def skipping(model: nn.Module, adapter: Adapter, blocks: Collection[str]) -> Iterator[None]:
    """Inside the context, the blocks of these names return their input."""
    modules = dict(adapter.blocks(model))
    with ExitStack() as stack:
        for name in blocks:
            block = modules[name]
            stack.enter_context(stubbed([block], _pass_through(block.forward)))
        yield


def _pass_through(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A function that returns its state in the form of ``forward``: alone, or first in a tuple.

    The first call calls ``forward`` to find its form. If the block returns several values, every
    call calls it, and only the state is replaced.
    """
    lengths: list[int | None] = []

    def stub(*args: Any, **kwargs: Any) -> Any:
        state = passed_state(args, kwargs)
        if lengths in ([None], [1]):
            return state if lengths == [None] else (state,)
        result = forward(*args, **kwargs)
        is_sequence = isinstance(result, tuple | list)
        lengths[:] = [len(result) if is_sequence else None]
        return (state, *result[1:]) if is_sequence else state

    return stub


def loss_without(
    model: nn.Module, adapter: Adapter, tokens: Tensor, blocks: Collection[str] = ()
) -> float:
    """The mean loss per token of a model without some of its blocks; infinite in place of NaN.

    Args:
        model: a causal language model of transformers.
        adapter: the adapter of its family.
        tokens: token ids (windows, seqlen).
        blocks: the full names of the blocks to leave out.
    """
    with adapter.running(model), skipping(model, adapter, blocks):
        loss = math.log(perplexity(model, tokens))
    return math.inf if math.isnan(loss) else loss  # NaN has no order
