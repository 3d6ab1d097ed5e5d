"""A check: one promise of an adapter, and the faults that are found in it, each in a line."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps

from apt.conformance.checks.subject import Subject

Check = Callable[[Subject], None]


@dataclass(frozen=True)
class Fault:
    """Something that an adapter gets wrong.

    Args:
        place: the block; empty where it is the adapter as a whole.
        said: what is wrong there: the rest of the sentence, or of a path, that begins with it.
        method: the adapter's method that is at fault, where there is one.
    """

    place: str
    said: str
    method: str = ""


class Nonconformance(AssertionError):
    """What an adapter gets wrong, a line for each fault.

    Attributes:
        lines: each line, with the method that is at fault.
    """

    def __init__(self, faults: list[Fault]) -> None:
        self.lines = _lines(faults)
        super().__init__("\n".join(line for line, _ in self.lines))


def promise(faults: Callable[[Subject], Iterator[Fault]]) -> Check:
    """Turn a generator of faults into a check, which raises them all as a `Nonconformance`."""

    @wraps(faults)
    def check(subject: Subject) -> None:
        found: list[Fault] = []
        try:
            for fault in faults(subject):
                found.append(fault)
        except Exception as error:
            if not found:
                raise
            raise Nonconformance(found) from error
        if found:
            raise Nonconformance(found)

    return check


def _lines(faults: list[Fault]) -> list[tuple[str, str]]:
    """A line for each fault; one that several blocks have is told of the first of them."""
    places = Counter((fault.said, fault.method) for fault in dict.fromkeys(faults))
    lines: dict[tuple[str, str], tuple[str, str]] = {}
    for fault in faults:
        kind = (fault.said, fault.method)
        more = f" (and so in {places[kind] - 1} more blocks)" if places[kind] > 1 else ""
        lines.setdefault(kind, (f"{fault.place}{fault.said}{more}", fault.method))
    return list(lines.values())
