"""The exception for errors that a user can correct, and helpers for its messages."""

from collections.abc import Iterable
from difflib import get_close_matches


class AptError(Exception):
    """An error that the user can correct.

    Args:
        message: the fault and its place, in one line.
        hint: the remedy.
        options: the options that the hint refers to, by their names in Python:
            ``"own_samples"``. The command line adds its flags for them.
    """

    def __init__(self, message: str, hint: str = "", options: Iterable[str] = ()) -> None:
        self.message, self.hint, self.options = message, hint, tuple(options)
        super().__init__(f"{message}; {hint}" if hint else message)

    @property
    def faults(self) -> list[str]:
        """One line for each fault. Some errors collect several faults; the others have one."""
        return [str(self)]

    def add_hint(self, hint: str, *options: str) -> None:
        """Add a hint that refers to these options."""
        self.options += options
        self.hint = f"{self.hint}; {hint}" if self.hint else hint
        self.args = (f"{self.message}; {self.hint}",)


class NotStoredError(AptError):
    """A checkpoint's tensors cannot be read one by one as the parameters of the model."""


def unknown(kind: str, name: str, known: Iterable[str], where: str = "") -> AptError:
    """The error for an unknown name, with the closest known name or a list of all."""
    names = sorted(known)
    close = get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names) or 'none'}"
    return AptError(f"no {kind} '{name}'", hint + where)


def faulty(what: str, fault: str, kind: str, *options: str) -> AptError:
    """The error for code of a plugin, such as ``method mine``, that returns what it must not."""
    return AptError(f"{what} {fault}", f"use another {kind}, and tell its author", options)


def name_of(kind: str, function: object) -> str:
    """The name of a function of the caller that is given in place of the name of a plugin.

    Raises:
        AptError: it is no function.
    """
    if isinstance(function, type) or not callable(function):
        raise AptError(f"{kind} is {function!r}", "give its name, or a function", (kind,))
    return str(getattr(function, "__name__", type(function).__name__))


_LONGEST = 100  # characters of a name within a message


def shortened(name: str) -> str:
    """A name for use inside a message, with the middle of a long one left out."""
    if len(name) <= _LONGEST:
        return name
    return f"{name[:48]}…{name[-48:]}"


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, for use inside a one-line message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    count = 2 if lines[0].endswith(":") else 1
    return " ".join(lines[:count]).rstrip(".: ")


def described(error: BaseException) -> str:
    """`first_line`, with the type of an exception whose text is not clear without it.

    The text of a KeyError is the key alone. That of a TypeError is written for programmers.
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
    """The line for an error for want of memory, or of a library; None for another error."""
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
