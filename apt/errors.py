"""The one exception for what a user can mend."""

from collections.abc import Iterable
from difflib import get_close_matches


class AptError(Exception):
    """Something that the user can mend.

    Args:
        message: one line that says what is wrong and where.
        hint: what to do about it.
        options: the names of the options that the hint speaks of, as programs know them:
            ``"own_samples"``. The command line adds its flags for them.
    """

    def __init__(self, message: str, hint: str = "", options: Iterable[str] = ()) -> None:
        self.message, self.hint, self.options = message, hint, tuple(options)
        super().__init__(f"{message}; {hint}" if hint else message)

    @property
    def faults(self) -> list[str]:
        """A line for each thing that is wrong: one, but for errors that collect several."""
        return [str(self)]

    def add_hint(self, hint: str, *options: str) -> None:
        """Say one thing more, about the options of these names."""
        self.options += options
        self.hint = f"{self.hint}; {hint}" if self.hint else hint
        self.args = (f"{self.message}; {self.hint}",)


class NotStoredError(AptError):
    """A checkpoint's tensors cannot be read one by one as the parameters of the model."""


def unknown(kind: str, name: str, known: Iterable[str], where: str = "") -> AptError:
    """The error for a name that nothing answers to, with the closest one that something does."""
    names = sorted(known)
    close = get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names) or 'none'}"
    return AptError(f"no {kind} '{name}'", hint + where)


_LONGEST = 100  # characters of a name within a message


def shortened(name: str) -> str:
    """A name for use inside a message: a long one has its middle left out."""
    if len(name) <= _LONGEST:
        return name
    return f"{name[:48]}…{name[-48:]}"


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, for use inside a one-line message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    said = 2 if lines[0].endswith(":") else 1
    return " ".join(lines[:said]).rstrip(".: ")


def described(error: BaseException) -> str:
    """`first_line`, with the kind of an exception whose text alone says nothing to a reader.

    A KeyError's text is the key alone, and that of a TypeError is written for programmers.
    """
    said = first_line(error)
    if isinstance(error, RecursionError):
        return "a JSON file of it is nested too deeply"
    if "unhashable type" in said:  # a loader looks a value up by what should be a name
        return "one of its JSON files has a list or an object where a single value belongs"
    if isinstance(error, KeyError):
        return f"{said} is missing or unknown"
    plain = isinstance(error, TypeError | AttributeError | IndexError | AssertionError)
    return f"{type(error).__name__}: {said}" if plain and said != type(error).__name__ else said
