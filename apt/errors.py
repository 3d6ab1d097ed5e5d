"""The exception for errors that a user can correct, and helpers for its messages."""

from collections.abc import Iterable
from difflib import get_close_matches

SLOW_PRODUCTS = "packed products are slow here"
"""The beginning of the warning of a machine without kernels for packed models."""


class AptError(Exception):
    """An error that the user can correct.

    Args:
        message: the problem and its place, in one line.
        hint: the remedy.
        options: the options that the hint refers to, by their names in Python:
            ``"own_samples"``. The command line adds its flags for them.
    """

    def __init__(self, message: str, hint: str = "", options: Iterable[str] = ()) -> None:
        self.message, self.hint, self.options = message, hint, tuple(options)
        super().__init__(f"{message}; {hint}" if hint else message)

    @property
    def faults(self) -> list[str]:
        """One line for each problem. Some errors collect several problems; the others have one."""
        return [str(self)]

    def add_hint(self, hint: str, *options: str) -> None:
        """Add a hint that refers to these options."""
        self.options += options
        self.hint = f"{self.hint}; {hint}" if self.hint else hint
        self.args = (f"{self.message}; {self.hint}",)


class NotStoredError(AptError):
    """A checkpoint's tensors cannot be read one by one as the parameters of the model."""


def unknown_name(kind: str, name: str, names: Iterable[str], suffix: str = "") -> AptError:
    """The error for an unknown name, with the closest known name or a list of all names."""
    sorted_names = sorted(names)
    closest = get_close_matches(name.lower(), sorted_names, n=1, cutoff=0.5)
    hint = (
        f"did you mean '{closest[0]}'?"
        if closest
        else f"known: {', '.join(sorted_names) or 'none'}"
    )
    return AptError(f"no {kind} '{name}'", hint + suffix)


def plugin_error(what: str, problem: str, kind: str, *options: str) -> AptError:
    """The error for a wrong result of a plugin.

    Args:
        what: the plugin, such as ``method mine``.
        problem: the rest of the sentence.
        kind: the kind of plugin, for the hint.
        options: the options that name the plugin.
    """
    return AptError(f"{what} {problem}", f"use another {kind}, and tell its author", options)


def name_of(kind: str, function: object) -> str:
    """The name of a function that a program passes in place of the name of a plugin.

    Raises:
        AptError: the object is no function.
    """
    if isinstance(function, type) or not callable(function):
        raise AptError(f"{kind} is {function!r}", "give its name, or a function", (kind,))
    return str(getattr(function, "__name__", type(function).__name__))


_MAX_NAME = 100  # characters of a name within a message


def shortened(name: str) -> str:
    """A name for use inside a message. A long name is shortened in the middle."""
    if len(name) <= _MAX_NAME:
        return name
    return f"{name[:48]}…{name[-48:]}"


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, for use inside a one-line message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    count = 2 if lines[0].endswith(":") else 1
    return " ".join(lines[:count]).rstrip(".: ")


def describe(error: BaseException) -> str:
    """`first_line`, with the type of the exception if the text is not clear without it.

    The text of a KeyError is the key alone. The text of a TypeError is written for programmers.
    """
    line = first_line(error)
    if isinstance(error, RecursionError):
        return "a JSON file of it is nested too deeply"
    if "unhashable type" in line:  # a loader used a list or an object as a key
        return "one of its JSON files has a list or an object where a single value belongs"
    if isinstance(error, KeyError):
        return f"{line} is missing or unknown"
    unclear = isinstance(error, TypeError | AttributeError | IndexError | AssertionError)
    return f"{type(error).__name__}: {line}" if unclear and line != type(error).__name__ else line


_ALLOCATION = ("can't allocate memory", "out of memory", "cannot allocate memory")
_LIBRARY = ("failed to map segment", "cannot allocate memory", "cannot open shared object")


def resource_error(error: BaseException) -> AptError | None:
    """The user's error for a lack of memory, or a library that cannot be loaded; else None."""
    text = str(error).lower()
    if isinstance(error, ImportError) and any(part in text for part in _LIBRARY):
        return AptError(
            f"a library cannot be loaded: {first_line(error)}",
            "is there too little memory, or a limit (ulimit -v)?",
        )
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(part in text for part in _ALLOCATION)
    ):
        return AptError(
            f"there is too little memory: {first_line(error)}",
            "use fewer samples, or stream the model",
            ("samples", "stream"),
        )
    return None
