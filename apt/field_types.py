"""Type checks of what plugins declare: a wrong value is an error at its declaration."""

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
    """Raise TypeError if the value of a field does not have the annotated type.

    An annotation is a class, a Literal, a ``tuple[…, ...]``, or a union of these. Fields that a
    subclass of another package adds are not checked.

    Args:
        declared: an instance of a dataclass with the field ``name``.
    """
    own: Any = type(declared)
    owner, kinds = _field_types(own)
    for name, allowed in kinds.items():
        if problem := misfit(getattr(declared, name), allowed):
            raise TypeError(f"{owner} {declared.name!r}: {name} {problem}")


@cache
def _field_types(declared: Any) -> tuple[str, dict[str, tuple[Any, ...]]]:
    """The class of APT that declares the fields, and the types that each annotation allows."""
    owner: Any = next(c for c in declared.__mro__ if c.__module__.partition(".")[0] == "apt")
    hints = get_type_hints(owner)
    return owner.__name__, {each.name: alternatives(hints[each.name]) for each in fields(owner)}


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def misfit(value: Any, kinds: tuple[Any, ...]) -> str:
    """The end of a message: the value has none of these types. Empty if it has one of them."""
    if type(value) in kinds:  # almost always, and a mixture declares thousands of sites
        return ""
    return "" if any(_fits(value, kind) for kind in kinds) else _misfit_of(value, kinds)


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, member) for member in get_args(kind))
    if get_origin(kind) is not None:  # a mapping
        key_type, value_type = get_args(kind)
        return isinstance(value, get_origin(kind)) and all(
            _fits(key, key_type) and _fits(item, value_type) for key, item in value.items()
        )
    if isinstance(value, bool):  # True is an int in Python, but no number of anything
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _misfit_of(value: Any, allowed: tuple[Any, ...]) -> str:
    if isinstance(value, Mapping):
        return _misfit_of_mapping(value, allowed)
    item_type = next((get_args(kind)[0] for kind in allowed if get_origin(kind) is tuple), None)
    if item_type is None:
        return f"is {value!r}, not {' or '.join(map(_type_in_words, allowed))}"
    if isinstance(value, tuple):
        wrong = next(item for item in value if not _fits(item, item_type))
        return f"has {wrong!r}, which is not {item_type.__name__}"
    return f"is {value!r}, not a tuple{_REMEDIES.get(type(value), '').format(value)}"


def _misfit_of_mapping(value: Mapping[Any, Any], allowed: tuple[Any, ...]) -> str:
    for kind in (kind for kind in allowed if get_origin(kind) is Mapping):
        key_type, value_type = get_args(kind)
        for key, item in value.items():
            if not _fits(key, key_type):
                return f"has the name {key!r}, not {_type_in_words(key_type)}"
            if not _fits(item, value_type):
                return f"has {item!r} for {key}, not {_type_in_words(value_type)}"
    return f"is {value!r}, not {' or '.join(map(_type_in_words, allowed))}"


def _type_in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_type_in_words, get_args(kind)))
    return "None" if kind is NoneType else str(getattr(kind, "__name__", kind))
