"""The line of a plugin author's file in which an error occurred, for one-line messages."""

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
    """One line with the text of an exception and its place in the author's code.

    Args:
        owner: the adapter or function that was called. Its definition is the place if the
            traceback has no line of the author's code.
    """
    if isinstance(error, AptError):
        return error.message + (_own_frame(error) or place_of(owner))
    is_instance = owner is not None and not isinstance(owner, type)
    if isinstance(error, AttributeError) and is_instance and error.obj is owner:
        return f"{type(owner).__name__} has no '{error.name}'{place_of(owner)}"
    text = str(error.msg) if isinstance(error, SyntaxError) else first_line(error)
    text = text if text == type(error).__name__ else f"{type(error).__name__}: {text}"
    return text + (_own_frame(error) or place_of(owner))


def place_of(owner: Any, method: str = "") -> str:
    """The file and line of a class or a function, or of an adapter's method or class.

    The result is the class of an adapter if no ``method`` is given, or if APT defines the method.
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
    except (OSError, TypeError):  # a class without a source file
        return ""
    return at(file, first)


def _own_frame(error: BaseException) -> str:
    """The last line of a traceback outside APT, torch, transformers and Python."""
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
    """``(file:line)``, with a path relative to the working directory if the file is in it."""
    path = Path(filename)
    current = Path.cwd()
    shown = path.relative_to(current) if path.is_relative_to(current) else path
    return f" ({shown}:{line})"
