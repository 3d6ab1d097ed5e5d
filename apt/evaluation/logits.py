"""The logits of a model in parts: for a large vocabulary they take most of the memory.

The code after the body of a model (a head, scaling, soft caps) works token by token. So the body is
run once, and then the model is run several times with a stub as the body, which returns a part of
the states each time.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from apt.text.language_model import language_model

PART = 2**26  # bytes of logits in a part, or the bytes of one token if they are more
MOST_STATES = 2**30  # bytes of the kept states of one model
COPIES = 4  # copies of a part's logits: the original, in fp32, and intermediate results
_FP32 = 4


def parts_of_logits(model: nn.Module, tokens: Tensor) -> Iterator[Tensor]:
    """The logits in parts (samples, n, vocabulary) of n consecutive tokens of each sample.

    If the model's body cannot be separated from its head, the logits are a single part.

    Args:
        tokens: token ids (samples, seqlen).
    """
    model = language_model(model)
    kept = next((each for each in _kept.get() if each.model is model), None)
    recorded = None if kept is None else kept.find(tokens)
    if recorded is None:
        recorded = _BodyOutput(len(tokens), tokens.shape[1])
        with recorded.watching(model):
            logits = _logits(model, tokens)
        if recorded.body is None:
            yield logits
            return
        recorded.vocabulary = logits.shape[2]
        del logits
        if kept is not None:
            kept.add(tokens, recorded)
    assert recorded.body is not None
    length = max(1, PART // (_FP32 * len(tokens) * recorded.vocabulary))
    for states in torch.split(recorded.states, length, dim=1):
        with _forward(recorded.body, lambda *args, s=states, **kwargs: recorded.given(s)):
            yield _logits(model, tokens)


@contextmanager
def kept_states(model: nn.Module) -> Iterator[None]:
    """Inside the context, the body of ``model`` runs once on the same tokens.

    Several metrics then share its states, up to `MOST_STATES` bytes. The model must not change.
    """
    token = _kept.set((*_kept.get(), _KeptStates(model)))
    try:
        yield
    finally:
        _kept.reset(token)


def part_bytes(vocabulary: int, samples: int, seqlen: int) -> int:
    """The bytes of one part of the logits of ``samples`` × ``seqlen`` tokens, with its copies."""
    least = _FP32 * vocabulary * samples
    return COPIES * max(least, min(PART, least * seqlen))


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens, use_cache=False).logits
    return logits


@dataclass
class _BodyOutput:
    """The output of a model's body, recorded in a run whose head receives only the first token.

    Attributes:
        samples, seqlen: the shape of the tokens.
        body: the outermost module that returns states; None if no module does.
        inside: True during the forward of a body.
        vocabulary: the number of logits of a token.
    """

    samples: int
    seqlen: int
    body: nn.Module | None = None
    output: Any = None
    inside: bool = False
    vocabulary: int = 0

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
        """Inside the context, the body's output is recorded and cut to the first token."""
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
        """True if the first element of ``output`` is the states of all tokens."""
        named = is_dataclass(output) and hasattr(output, "last_hidden_state")
        first: Any = output[0] if named or isinstance(output, tuple) else None
        return isinstance(first, Tensor) and first.shape[:2] == (self.samples, self.seqlen)


class _KeptStates:
    """The outputs of the body of one model, by the tokens."""

    def __init__(self, model: nn.Module) -> None:
        self.model = language_model(model)
        self._outputs: dict[tuple[torch.Size, bytes], _BodyOutput] = {}
        self._bytes = 0

    def find(self, tokens: Tensor) -> _BodyOutput | None:
        """The output of an earlier run on these tokens; None without such a run."""
        return self._outputs.get(_key(tokens))

    def add(self, tokens: Tensor, recorded: _BodyOutput) -> None:
        """Keep the output of a run if it fits into the limit."""
        if self._bytes + recorded.states.nbytes <= MOST_STATES:
            self._bytes += recorded.states.nbytes
            self._outputs[_key(tokens)] = recorded


_kept: ContextVar[tuple[_KeptStates, ...]] = ContextVar("kept states", default=())


def _key(tokens: Tensor) -> tuple[torch.Size, bytes]:
    return tokens.shape, tokens.cpu().numpy().tobytes()


def _bodies(model: nn.Module) -> list[nn.Module]:
    """The candidates for the body: the base model, and its decoder, which some models call."""
    base = getattr(model, "base_model", None)
    candidates = [base, getattr(base, "decoder", None)]
    return [each for each in candidates if isinstance(each, nn.Module) and each is not model]


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside the context, ``forward`` replaces the forward of ``module``."""
    previous = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if previous is not None:
            module.forward = previous
