"""The check of the arguments of public functions, by their annotations."""

import inspect
from collections.abc import Callable, Sequence
from functools import cache, wraps
from numbers import Integral, Real
from types import NoneType
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

from apt.errors import AptError
from apt.field_types import alternatives

P = ParamSpec("P")
R = TypeVar("R")

_NUMBERS: dict[Any, type] = {int: Integral, float: Real}  # those of numpy are numbers too
_WORDS = {NoneType: "None", str: "a text", int: "a whole number", float: "a number"}
_PLAIN = (str, int, float, NoneType)  # what a message shows as it is
_LONGEST = 40


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator: an argument that has not its annotated type is an `AptError` that names it.

    An annotation is a class, a Literal, a Callable, a sequence of texts, or a union of these. An
    annotation with anything else, such as a protocol, is not checked: the function does so.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: P.args, **named: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **named).arguments
        except TypeError:  # a missing or unknown argument: Python says so
            return function(*args, **named)
        for name, kinds in _kinds_of(function).items():
            if name in given and not any(_fits(given[name], kind) for kind in kinds):
                raise _error(name, given[name], kinds)
        return function(*args, **named)

    return call


@cache
def _kinds_of(function: Callable[..., Any]) -> dict[str, tuple[Any, ...]]:
    """The types that each argument may have, without those that are not checked."""
    hints = get_type_hints(function)
    known = {name: alternatives(_bound(hints[name])) for name in hints if name != "return"}
    return {name: kinds for name, kinds in known.items() if all(map(_is_checked, kinds))}


def _bound(hint: Any) -> Any:
    return hint.__bound__ if isinstance(hint, TypeVar) else hint


def _is_checked(kind: Any) -> bool:
    """True for a Literal, and for a type that is a class and no protocol."""
    origin = get_origin(kind) or kind
    if origin is Any or getattr(origin, "_is_protocol", False):  # `Any` is a class since 3.11
        return False
    return origin is Literal or isinstance(origin, type)


def _fits(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        return value in parts
    if isinstance(value, bool):  # True is an int in Python, but no number of anything
        return kind is bool
    if isinstance(value, str) and origin is not str:  # not a sequence of letters
        return False
    if not isinstance(value, _NUMBERS.get(origin, origin)):
        return False
    return origin is not Sequence or all(_fits(item, parts[0]) for item in value)


def _error(name: str, value: Any, kinds: Sequence[Any]) -> AptError:
    wanted = " or ".join(dict.fromkeys(map(_worded, kinds)))
    return AptError(f"{name} is {_shown(value)}", f"give {wanted}", (name,))


def _shown(value: Any) -> str:
    """A value in a message of one line: itself if it is short and plain, else its class."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, _PLAIN) and len(repr(value)) <= _LONGEST:
        return repr(value)
    kind = type(value)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__.partition('.')[0]}."
    return f"of the class {module}{kind.__name__}"


def _worded(kind: Any) -> str:
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is Callable:
        return "a function"
    if origin is Sequence:
        return "a sequence of texts"
    return _WORDS.get(origin) or f"an object of the class {origin.__name__}"
