"""Where in an author's own file something went wrong, and what, in a line."""

import inspect
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import apt
from apt.errors import AptError, first_line

_PATHS = sysconfig.get_paths()
_NOT_OWN = [Path(str(module.__file__)).parent for module in (apt, torch, transformers)]
_STANDARD = [Path(_PATHS[name]) for name in ("stdlib", "platstdlib")]
_PACKAGES = [Path(_PATHS[name]) for name in ("purelib", "platlib")]


def explained(error: BaseException, owner: Any = None) -> str:
    """A line that says what was raised, and where in the author's own code.

    Args:
        error: what was raised.
        owner: the adapter or function at work, for where there is no line of the author's.
    """
    if isinstance(error, AptError):
        return error.message + (_own_frame(error) or place_of(owner))
    if isinstance(error, AttributeError) and owner is not None and error.obj is owner:
        return f"{type(owner).__name__} has no '{error.name}'{place_of(owner)}"
    said = str(error.msg) if isinstance(error, SyntaxError) else first_line(error)
    said = said if said == type(error).__name__ else f"{type(error).__name__}: {said}"
    return said + (_own_frame(error) or place_of(owner))


def place_of(owner: Any, method: str = "") -> str:
    """The file and line of an adapter's method, or of its class; or of a class or function.

    A method that is APT's own is not the author's: there, and where ``method`` is none, it is the
    class.
    """
    if owner is None:
        return ""
    if inspect.isfunction(owner):
        return at(owner.__code__.co_filename, owner.__code__.co_firstlineno)
    function: Callable[..., Any] | None = getattr(type(owner), method, None) if method else None
    function = inspect.unwrap(function) if function is not None else None
    code = getattr(function, "__code__", None)
    if code is not None and _is_own(code.co_filename):
        return at(code.co_filename, code.co_firstlineno)
    kind = owner if isinstance(owner, type) else type(owner)
    try:
        _, first = inspect.getsourcelines(kind)
        file = inspect.getsourcefile(kind) or ""
    except (OSError, TypeError):  # a class made without a file
        return ""
    return at(file, first)


def _own_frame(error: BaseException) -> str:
    """The last line in a traceback that is neither APT's, torch's, transformers' nor Python's."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return at(error.filename, error.lineno)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_own(f.filename)]
    return at(frames[-1].filename, frames[-1].lineno or 0) if frames else ""


def _is_own(filename: str) -> bool:
    if filename.startswith("<"):
        return False
    path = Path(filename)
    if any(path.is_relative_to(folder) for folder in _NOT_OWN):
        return False
    installed = any(path.is_relative_to(folder) for folder in _PACKAGES)
    return installed or not any(path.is_relative_to(folder) for folder in _STANDARD)


def at(filename: str, line: int) -> str:
    """``(file:line)``, the file as seen from where one stands, if it lies there."""
    path = Path(filename)
    here = Path.cwd()
    shown = path.relative_to(here) if path.is_relative_to(here) else path
    return f" ({shown}:{line})"
