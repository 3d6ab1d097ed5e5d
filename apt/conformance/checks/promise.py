"""The type of checks, each of one promise of an adapter, and the faults that they report."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps

from apt.conformance.checks.subject import Subject

Check = Callable[[Subject], None]


@dataclass(frozen=True)
class Fault:
    """A fault of an adapter.

    Args:
        place: the block; empty for a fault of the adapter as a whole.
        message: the rest of the line after ``place``: a description of the fault.
        method: the faulty method of the adapter; empty if it is unknown.
    """

    place: str
    message: str
    method: str = ""


Faults = Iterator[Fault | tuple[str, str]]
"""The faults of a check. A fault of the checked method may be a pair of place and message."""


class Nonconformance(AssertionError):
    """The faults of an adapter, one in each line.

    Attributes:
        lines: each line, with the faulty method.
    """

    def __init__(self, faults: list[Fault]) -> None:
        self.lines = _lines(faults)
        super().__init__("\n".join(line for line, _ in self.lines))


def promise(method: str = "") -> Callable[[Callable[[Subject], Faults]], Check]:
    """Turn a generator of faults into a check that raises them all as a `Nonconformance`.

    Args:
        method: the method of the adapter that is checked; empty for the adapter as a whole.
    """

    def decorated(faults: Callable[[Subject], Faults]) -> Check:
        @wraps(faults)
        def check(subject: Subject) -> None:
            found: list[Fault] = []
            try:
                for fault in faults(subject):
                    found.append(fault if isinstance(fault, Fault) else Fault(*fault, method))
            except Exception as error:
                if not found:
                    raise
                raise Nonconformance(found) from error
            if found:
                raise Nonconformance(found)

        return check

    return decorated


def _lines(faults: list[Fault]) -> list[tuple[str, str]]:
    """A line for each fault. A fault of several blocks has one line, for the first of them."""
    places = Counter((fault.message, fault.method) for fault in dict.fromkeys(faults))
    lines: dict[tuple[str, str], tuple[str, str]] = {}
    for fault in faults:
        key = (fault.message, fault.method)
        suffix = f" (the same in {places[key] - 1} more blocks)" if places[key] > 1 else ""
        lines.setdefault(key, (f"{fault.place}{fault.message}{suffix}", fault.method))
    return list(lines.values())
