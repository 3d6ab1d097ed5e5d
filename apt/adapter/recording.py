"""The recording of block calls: one run of the model with stubs in place of its blocks."""

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from apt.adapter.samples import ModelInputs
from apt.adapter.sites import Call
from apt.errors import AptError

_STATES = ("hidden_states", "hidden_state")
"""The keywords with which models pass the state to a block."""
_GRIDS = ("grid_thw", "image_grid_thw", "image_grid_hw")
"""The arguments with the sizes of images in patches (images, 2 or 3)."""


@dataclass(frozen=True)
class _OtherValue:
    """A placeholder for a value that a block returns beside the stream.

    Attributes:
        place: the index among the returned values.
    """

    place: int


_Form = Callable[[Tensor], Any]
# The forms of a block's result, in the order in which they are tried. A plain tensor is last: a
# model that unpacks two values would take two samples of it.
_FORMS: tuple[_Form, ...] = (
    lambda state: (state,),
    lambda state: (state, _OtherValue(1)),
    lambda state: (state, _OtherValue(1), _OtherValue(2)),
    lambda state: state,
)
_form_of_block: WeakKeyDictionary[nn.Module, _Form] = WeakKeyDictionary()
_observed: WeakKeyDictionary[nn.Module, _Form] = WeakKeyDictionary()  # see `note_form`


class _LastBlock(Exception):
    """Ends a recording run at the last block."""


class UncalledError(AptError):
    """A model does not call some of its blocks.

    Attributes:
        called: the indices of the blocks that it calls.
    """

    def __init__(self, message: str, called: Sequence[int]) -> None:
        super().__init__(message)
        self.called = list(called)


def record_calls(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    tokens: ModelInputs,
    earlier: Sequence[tuple[Sequence[nn.Module], Tensor]] = (),
) -> tuple[Tensor, list[Call]]:
    """Run ``model`` once with every block stubbed, and record the call of each block.

    So blocks of different kinds keep their own masks and positions. If a block takes a value that
    the block before returns beside the stream, its call records this in `Call.carried`, with None
    for the value. Mappings that the blocks fill are recorded in `Call.shared`.

    Args:
        model: a transformers model.
        blocks: its blocks, in the order in which it calls them.
        tokens: the inputs of the model; token ids (samples, seqlen) for a decoder.
        earlier: the blocks of the stacks that the model runs first, with the stream after each of
            these stacks, which the last of its blocks returns. The model itself passes it on.

    Returns:
        The state before the first block (samples, seqlen, hidden) and one call for each block.

    Raises:
        UncalledError: the model does not call some of the blocks.
    """
    failures: list[tuple[int, Exception]] = []
    observed = [_observed[blocks[0]]] if blocks[0] in _observed else []
    unknown = any(passed[-1] not in _observed for passed, _ in earlier)
    for end_form, form in product(_FORMS if unknown else _FORMS[:1], (*observed, *_FORMS)):
        states: list[Tensor] = []
        calls: list[Call] = []
        try:
            with ExitStack() as stack:
                for passed, end in earlier:
                    known = _observed.get(passed[-1], end_form)
                    stack.enter_context(stubbed(passed, partial(_passed, known)))
                    stack.enter_context(stubbed(passed[-1:], partial(_ended, known, end)))
                _run(model, blocks, tokens, form, states, calls)
        except AptError:
            raise
        except Exception as error:  # perhaps the model cannot unpack what its blocks returned
            failures.append((len(calls), error))
            continue
        _form_of_block.update(dict.fromkeys(blocks, form))
        for passed, _ in earlier:
            known = _observed.get(passed[-1], end_form)
            _form_of_block.update(dict.fromkeys(passed, known))
        taken = {place for call in calls for place in call.carried.values()}
        return states[0], [replace(call, keeps=1 + max(taken, default=0)) for call in calls]
    raise max(failures, key=lambda failure: failure[0])[1]  # of the run with the most calls


def note_form(block: nn.Module, values: int | None) -> None:
    """Note what a block was seen to return, so that `record_calls` tries this form first.

    Args:
        values: the length of the returned tuple, of which the stream is the first item; None for
            the stream alone.
    """
    if values is None:
        _observed[block] = _FORMS[-1]
        return
    others = tuple(map(_OtherValue, range(1, values)))
    _observed[block] = lambda state: (state, *others)


def _run(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    tokens: ModelInputs,
    form: _Form,
    states: list[Tensor],
    calls: list[Call],
) -> None:
    """Run ``model`` up to its last block, and append the state and the call of each block."""

    called: list[int] = []

    def stub(index: int, /, *args: Any, **kwargs: Any) -> Any:
        state = passed_state(args, kwargs)
        states.append(state)
        called.append(index)
        name_of_state = None if args else state_keyword(kwargs)
        keywords = {name: value for name, value in kwargs.items() if name != name_of_state}
        others: list[tuple[int | str, Any]] = [*enumerate(args[1:]), *keywords.items()]
        carried = {key: value.place for key, value in others if isinstance(value, _OtherValue)}
        positional = tuple(None if isinstance(value, _OtherValue) else value for value in args[1:])
        keyword_values = {
            n: None if isinstance(value, _OtherValue) else value for n, value in keywords.items()
        }
        shared = tuple(n for n, value in keywords.items() if _is_empty_mapping(value))
        calls.append(Call(positional, keyword_values, name_of_state, carried, shared=shared))
        if len(calls) == len(blocks):
            raise _LastBlock
        return form(state)

    with ExitStack() as stack, torch.no_grad():
        for index, block in enumerate(blocks):
            stack.enter_context(stubbed([block], partial(stub, index)))
        try:
            run_body(model, tokens)
        except _LastBlock:
            return
    message = f"{type(model).__name__} called {len(calls)} of its {len(blocks)} blocks"
    raise UncalledError(message, called)


def body_of(model: Any, names: Collection[str]) -> nn.Module:
    """The body of a model if it takes arguments of these names, or else the model."""
    taken = signature(model.base_model.forward).parameters
    return model.base_model if all(name in taken for name in names) else model  # type: ignore[no-any-return]


def run_body(model: Any, inputs: ModelInputs) -> None:
    """Run the body of a model, without a cache of keys and values."""
    if isinstance(inputs, Tensor):
        model.base_model(inputs, use_cache=False)
        return
    base = body_of(model, inputs)
    with _without_caches(base):
        base(**in_one_sequence(inputs))


@contextmanager
def _without_caches(model: nn.Module) -> Iterator[None]:
    """Keep a model and its parts from making caches.

    Not every model has an argument for it: Decision Transformer passes none to its GPT-2.
    """
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    caching = list({id(c): c for c in configs if getattr(c, "use_cache", False)}.values())
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


def in_one_sequence(inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The inputs of a batch; of a model that takes sizes, the patches of all images in a row."""
    if (grid := grid_name(inputs)) is None:
        return inputs
    return {
        name: tensor if name == grid or tensor.ndim < 2 else tensor.flatten(0, 1)
        for name, tensor in inputs.items()
    }


def _passed(form: _Form, /, *args: Any, **kwargs: Any) -> Any:
    """The output of a stub of a block of an earlier stack: the input of the block."""
    return _without_others(form(passed_state(args, kwargs)))


def _ended(form: _Form, end: Tensor, /, *args: Any, **kwargs: Any) -> Any:
    """The output of a stub of the last block of an earlier stack: the stream ``end``."""
    return _without_others(form(end))


def _is_empty_mapping(value: Any) -> bool:
    """True for a mapping that blocks can only fill, such as keys and values for later layers."""
    return isinstance(value, MutableMapping) and not value


def stub_output(args: tuple[Any, ...], kwargs: dict[str, Any], block: nn.Module) -> Any:
    """The output of a stub of ``block`` that is called with these arguments: its input state.

    The output has the form that `record_calls` has found for the block, with None for other values.
    The default form is a tuple of the state alone. A model whose blocks return tuples unpacks it.
    Most other models pass it to the next stub, which unpacks it.
    """
    return _without_others(_form_of_block.get(block, _FORMS[0])(passed_state(args, kwargs)))


def _without_others(output: Any) -> Any:
    """The output of a stub, with None for other values than the stream."""
    if isinstance(output, tuple):
        return tuple(None if isinstance(value, _OtherValue) else value for value in output)
    return output


def grid_name(inputs: Mapping[str, Tensor]) -> str | None:
    """The name of the sizes of images among the inputs of a tower; None if there are none."""
    if "input_ids" in inputs:  # of a model of images and text
        return None
    return next((name for name in _GRIDS if name in inputs), None)


def state_keyword(kwargs: Mapping[str, Any]) -> str:
    """The keyword of the state among the arguments of a block without positional arguments."""
    return next((name for name in _STATES if name in kwargs), _STATES[0])


def passed_state(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The state among the arguments of a block; an earlier stub may have put it in a tuple."""
    passed: Any = args[0] if args else kwargs[state_keyword(kwargs)]
    state: Tensor = passed[0] if isinstance(passed, tuple) else passed
    return state


@contextmanager
def stubbed(blocks: Sequence[nn.Module], stub: Callable[..., Any]) -> Iterator[None]:
    """Inside the context, ``stub`` is called in place of each of ``blocks``.

    An instance attribute ``forward`` of a block, as accelerate sets it, is restored on exit.
    """
    original = {block: vars(block).get("forward") for block in blocks}
    for block in original:
        block.forward = stub
    try:
        yield
    finally:
        for block, forward in original.items():
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
        for module, mode in training:
            module.training = mode
