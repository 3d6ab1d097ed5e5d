"""What torch may make fp32 products of, said in either of its two ways.

Since torch 2.9 each backend's products have a precision of their own, which they inherit where none
is set (``torch.backends.fp32_precision``). The older setting for all of them
(`torch.set_float32_matmul_precision`) remains beside it, and writes over the new ones. Reading it
is an error where the two disagree, as they do once the new one alone allows less.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

Place = tuple[str, str]  # a backend and an operation of it, as torch names them
_ROOT: Place = ("generic", "all")
_PRODUCTS: tuple[Place, ...] = (("cuda", "matmul"), ("mkldnn", "matmul"))
_FULL = ("none", "ieee")
_HIGHEST = "highest"
_get: Any = getattr(torch._C, "_get_fp32_precision_getter", None)
_set: Any = getattr(torch._C, "_set_fp32_precision_setter", None)


@dataclass(frozen=True)
class Allowed:
    """What was allowed before `require_full`.

    Attributes:
        older: the older setting.
        changed: what was set at the places that have been changed: "none" where it is inherited.
    """

    older: str
    changed: Mapping[Place, str]


def require_full() -> Allowed:
    """Allow full fp32 products alone; what allows them already is not touched."""
    places = _PRODUCTS if _get is not None else ()
    own = {place: _own(place) for place in places}
    reduced = [place for place in places if _get(*place) not in _FULL]
    for place in reduced:
        _set(*place, "ieee")
    older = torch.get_float32_matmul_precision()  # the two agree by now
    if older == _HIGHEST:
        return Allowed(older, {place: own[place] for place in reduced})
    torch.set_float32_matmul_precision(_HIGHEST)
    return Allowed(older, own)


def restore(allowed: Allowed) -> None:
    """Allow again what was allowed."""
    if allowed.older != _HIGHEST:
        torch.set_float32_matmul_precision(allowed.older)
    for place, value in allowed.changed.items():
        _set(*place, value)


def _own(place: Place) -> str:
    """What is set at a place itself: torch tells what counts there, which may be inherited.

    Where that is what its parent has, it is inherited if it changes with the parent. To see that,
    the parent is set to full precision for a moment.
    """
    value: str = _get(*place)
    parent = _ROOT if place[1] == "all" else (place[0], "all")
    if value in _FULL or place == _ROOT or value != _get(*parent):
        return value
    before = _own(parent)
    _set(*parent, "ieee")
    inherited = _get(*place) != value
    _set(*parent, before)
    return "none" if inherited else value
