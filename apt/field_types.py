"""Type checks of declarations: a plugin's wrong value is an error where it is declared."""

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_REMEDIES: dict[Any, str] = {
    str: ": write ({!r},)",
    list: ": write tuple({!r})",
}  # in place of a tuple


def check_fields(declared: Any) -> None:
    """Raise TypeError if a field of a dataclass with a ``name`` has not its annotated type.

    An annotation is a class, a Literal, a ``tuple[…, ...]``, or a union of these. Fields that a
    subclass of another package adds are not checked.
    """
    classes = type(declared).__mro__
    declaring: Any = next(c for c in classes if c.__module__.partition(".")[0] == "apt")
    kinds = _kinds_of(declaring)
    for field in fields(declaring):
        if fault := misfit(getattr(declared, field.name), kinds[field.name]):
            raise TypeError(f"{declaring.__name__} {declared.name!r}: {field.name} {fault}")


@cache
def _kinds_of(declaring: Any) -> dict[str, tuple[Any, ...]]:
    """The types that each annotation of a class allows."""
    return {name: alternatives(hint) for name, hint in get_type_hints(declaring).items()}


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def misfit(value: Any, kinds: tuple[Any, ...]) -> str:
    """Why a value has none of these types; empty if it has one."""
    return "" if any(_fits(value, kind) for kind in kinds) else _fault(value, kinds)


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if get_origin(kind) is not None:  # a mapping
        name, item = get_args(kind)
        return isinstance(value, get_origin(kind)) and all(
            _fits(key, name) and _fits(entry, item) for key, entry in value.items()
        )
    if isinstance(value, bool):  # True is an int in Python, but no number of anything
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _fault(value: Any, allowed: tuple[Any, ...]) -> str:
    if isinstance(value, Mapping):
        return _fault_in_mapping(value, allowed)
    of = next((get_args(kind)[0] for kind in allowed if get_origin(kind) is tuple), None)
    if of is None:
        return f"is {value!r}, not {' or '.join(map(_worded, allowed))}"
    if isinstance(value, tuple):
        wrong = next(item for item in value if not _fits(item, of))
        return f"has {wrong!r}, which is not {of.__name__}"
    return f"is {value!r}, not a tuple{_REMEDIES.get(type(value), '').format(value)}"


def _fault_in_mapping(value: Mapping[Any, Any], allowed: tuple[Any, ...]) -> str:
    for kind in (kind for kind in allowed if get_origin(kind) is Mapping):
        name, item = get_args(kind)
        for key, entry in value.items():
            if not _fits(key, name):
                return f"has the name {key!r}, not {_worded(name)}"
            if not _fits(entry, item):
                return f"has {entry!r} for {key}, not {_worded(item)}"
    return f"is {value!r}, not {' or '.join(map(_worded, allowed))}"


def _worded(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_worded, get_args(kind)))
    return "None" if kind is NoneType else str(getattr(kind, "__name__", kind))
