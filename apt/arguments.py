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

_NUMBERS: dict[Any, type] = {int: Integral, float: Real}  # numbers of numpy are numbers too
_WORDS = {NoneType: "None", str: "a text", int: "a whole number", float: "a number"}
_PRINTABLE = (str, int, float, NoneType)  # what a message shows as it is
_MAX_LENGTH = 40


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator: an argument of another type than its annotation is an `AptError`.

    An annotation is a class, a Literal, a Callable, a sequence of texts, or a union of these. An
    argument with another annotation, such as a protocol, is checked by the function itself.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def check(*args: P.args, **keywords: P.kwargs) -> R:
        try:
            bound = signature.bind(*args, **keywords).arguments
        except TypeError:  # a missing or unknown argument: Python says so
            return function(*args, **keywords)
        for name, kinds in _checked_types(function).items():
            if name in bound and not any(_fits(bound[name], kind) for kind in kinds):
                raise _error(name, bound[name], kinds)
        return function(*args, **keywords)

    return check


@cache
def _checked_types(function: Callable[..., Any]) -> dict[str, tuple[Any, ...]]:
    """The types of each argument that is checked."""
    hints = get_type_hints(function)
    types = {name: alternatives(_bound(hints[name])) for name in hints if name != "return"}
    return {name: kinds for name, kinds in types.items() if all(map(_is_checked, kinds))}


def _bound(hint: Any) -> Any:
    return hint.__bound__ if isinstance(hint, TypeVar) else hint


def _is_checked(kind: Any) -> bool:
    """True for a Literal, and for a class that is no protocol."""
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
    expected = " or ".join(dict.fromkeys(map(_type_in_words, kinds)))
    return AptError(f"{name} is {_value_in_words(value)}", f"give {expected}", (name,))


def _value_in_words(value: Any) -> str:
    """A value in a message of one line: itself if it is short and plain, else its class."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, _PRINTABLE) and len(repr(value)) <= _MAX_LENGTH:
        return repr(value)
    kind = type(value)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__.partition('.')[0]}."
    return f"of the class {module}{kind.__name__}"


def _type_in_words(kind: Any) -> str:
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is Callable:
        return "a function"
    if origin is Sequence:
        return "a sequence of texts"
    return _WORDS.get(origin) or f"an object of the class {origin.__name__}"
