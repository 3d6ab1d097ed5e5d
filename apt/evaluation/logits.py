"""A model's logits in parts: those of a large vocabulary take more memory than all else of it.

What a model makes of its last states (a head, scaling, soft caps) is its own code, and works token
by token. So the body is run once, and the model several times with its body stubbed: each time it
gives some of the states.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

PART = 2**26  # bytes of logits, where those of a token are not more
COPIES = 4  # of a part's logits: as they are made, in fp32, and in between
_FP32 = 4


def parts_of_logits(model: nn.Module, tokens: Tensor) -> Iterator[Tensor]:
    """The logits (samples, n, vocabulary) after consecutive tokens of each sample, all in turn.

    Where the model's body cannot be told from its head, they are a single part.

    Args:
        model: a causal language model of transformers.
        tokens: token ids (samples, seqlen).
    """
    seen = _Seen(len(tokens), tokens.shape[1])
    with seen.watching(model):
        logits = _logits(model, tokens)
    if seen.body is None:
        yield logits
        return
    length = max(1, PART // (_FP32 * logits.shape[0] * logits.shape[2]))
    del logits
    for states in torch.split(seen.states, length, dim=1):
        with _forward(seen.body, lambda *args, s=states, **kwargs: seen.given(s)):
            yield _logits(model, tokens)


def part_bytes(vocabulary: int, samples: int, seqlen: int) -> int:
    """Bytes that a part of the logits of so many tokens takes, with what is made of them."""
    least = _FP32 * vocabulary * samples
    return COPIES * max(least, min(PART, least * seqlen))


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens, use_cache=False).logits
    return logits


@dataclass
class _Seen:
    """What a model's body gives, seen in a run in which its head gets the first token's alone.

    Attributes:
        samples, seqlen: of the tokens.
        body: the outermost module that gives states; None where there is none.
        output: what it gave.
    """

    samples: int
    seqlen: int
    body: nn.Module | None = None
    output: Any = None
    inside: bool = False

    @property
    def states(self) -> Tensor:
        """The states (samples, seqlen, hidden)."""
        states: Tensor = self.output[0]
        return states

    def given(self, states: Tensor) -> Any:
        """The body's output with other states."""
        if isinstance(self.output, tuple):
            return (states, *self.output[1:])
        return replace(self.output, last_hidden_state=states)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """While entered, the body's output is seen and cut."""
        with ExitStack() as stack:
            for body in _bodies(model):
                stack.enter_context(_forward(body, self._watched(body, body.forward)))
            yield

    def _watched(self, body: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.inside or self.body is not None:
                return forward(*args, **kwargs)
            self.inside = True
            try:
                output = forward(*args, **kwargs)
            finally:
                self.inside = False
            if not self._states(output):
                return output
            self.body, self.output = body, output
            return self.given(self.states[:, :1])

        return watched

    def _states(self, output: Any) -> bool:
        """Whether an output begins with the states of all tokens."""
        named = is_dataclass(output) and hasattr(output, "last_hidden_state")
        first: Any = output[0] if named or isinstance(output, tuple) else None
        return isinstance(first, Tensor) and first.shape[:2] == (self.samples, self.seqlen)


def _bodies(model: nn.Module) -> list[nn.Module]:
    """What may be the body: some models call their base model, others the decoder in it."""
    base = getattr(model, "base_model", None)
    found = [base, getattr(base, "decoder", None)]
    return [each for each in found if isinstance(each, nn.Module) and each is not model]


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While entered, ``forward`` is the module's."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
