"""The types of the entries of a report. A report is checked once, when it is read."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

Check = Callable[[Any], str]
"""A check of a value: its fault after the name of the entry, such as `` is no text``; or empty."""

_MOST, _LARGEST = 2**63 - 1, 1e305  # of a count, and of a number, such as a perplexity
_NOT_FINITE = ("Infinity", "-Infinity", "NaN")  # as `json_value` writes them


def text(value: Any) -> str:
    """A text."""
    return "" if isinstance(value, str) else " is no text"


def number(value: Any) -> str:
    """A number, finite or as text such as ``"Infinity"``."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value in _NOT_FINITE or (is_number and -_LARGEST < value < _LARGEST):
        return ""
    return " is no number"


def amount(value: Any) -> str:
    """A number of seconds or bytes."""
    fits = not number(value) and not isinstance(value, str) and 0 <= value <= _MOST
    return "" if fits else " is no amount"


def count(value: Any) -> str:
    """A whole number, not negative."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return "" if is_whole and 0 <= value <= _MOST else " is no count"


def size(value: Any) -> str:
    """A whole number above 0."""
    return count(value) or ("" if value else " is 0")


def optional(check: Check) -> Check:
    """A value, or null."""
    return lambda value: "" if value is None else check(value)


def either(*checks: Check) -> Check:
    """A value that passes one of the checks."""
    return lambda value: "" if not all(check(value) for check in checks) else checks[0](value)


def anything(value: Any) -> str:
    """Any value."""
    return ""


def many(check: Check) -> Check:
    """A list of values."""

    def fault(value: Any) -> str:
        if not isinstance(value, list):
            return " is no list"
        return _first((f"[{place}]", check(item)) for place, item in enumerate(value))

    return fault


def row(*checks: Check) -> Check:
    """A list with a value for each check."""

    def fault(value: Any) -> str:
        if not isinstance(value, list) or len(value) != len(checks):
            return f" is no list of {len(checks)} values"
        pairs = zip(checks, value, strict=True)
        return _first((f"[{place}]", check(item)) for place, (check, item) in enumerate(pairs))

    return fault


def named(check: Check) -> Check:
    """An object with values of one kind."""

    def fault(value: Any) -> str:
        if not isinstance(value, dict):
            return " is no object"
        return _first((f".{name}", check(item)) for name, item in value.items())

    return fault


def entries(needed: Mapping[str, Check], others: Mapping[str, Check] | None = None) -> Check:
    """An object with these entries; those of ``others`` may be missing, and there may be more."""
    known = {**needed, **(others or {})}

    def fault(value: Any) -> str:
        if not isinstance(value, dict):
            return " is no object"
        if missing := [name for name in needed if name not in value]:
            return f".{missing[0]} is missing"
        return _first((f".{n}", check(value[n])) for n, check in known.items() if n in value)

    return fault


def _first(faults: Iterable[tuple[str, str]]) -> str:
    """The first fault, after the place of its value."""
    return next((f"{place}{fault}" for place, fault in faults if fault), "")


def or_empty(check: Check) -> Check:
    """An object, or one without entries."""
    return lambda value: "" if value == {} else check(value)


_NAMES = optional(many(text))
_SCORES = entries({}, {"before": named(number), "after": named(number), "source": optional(text)})
_KEPT = entries({"kept": count, "of": count})
_OPTIONS = entries(
    {},
    {
        "pattern": optional(text), "only": _NAMES, "skip": _NAMES, "also": _NAMES,
        "overrides": optional(named(text)), "per": optional(text), "allocation": optional(text),
        "method": optional(text), "model": optional(text), "output": optional(text),
        "quantize": optional(text), "group": either(count, text),
        "shrink": optional(named(anything)),
    },
)  # fmt: skip
_SITE = entries(
    {
        "name": text, "kind": text, "pattern": text, "shape": row(size, size), "zeros": count,
        "tokens": count, "relative_error": number, "seconds": amount,
        "damping": optional(number), "residual": optional(number),
    },
    {"order": optional(many(count))},
)  # fmt: skip
_STRUCTURE = entries(
    {"blocks": _KEPT, "groups": named(_KEPT), "share": number},
    { "experts": named(
            entries(
                {"removed": many(count), "merged": many(row(count, count))},
                {"scores": many(number), "underserved": many(count), "unprotected": many(count)},
            )
        ),
        "candidates": many(
            entries({"loss": number, "share": number, "blocks": count, "groups": named(count)})
        ),
    },
)  # fmt: skip
_ROUTED = entries({"tokens": named(many(count)), "weights": named(many(number))})
_SOURCE = entries({"name": text, "share": number, "samples": count})
_TRAINING = entries(
    {"tokens": count, "held_back": many(row(count, number)), "losses": many(number)},
    {"best": count, "diverged": optional(count)},
)
_RECOVERY = entries(
    {},
    {
        "training": _TRAINING, "options": entries({"kind": text}),
        "parameters_before": count, "rate": number, "dense_loss": optional(number), "zeros": count,
        "scores": _SCORES, "earlier": named(anything), "seconds": amount,
    },
)  # fmt: skip

_REPORT = entries(
    {
        "schema": count, "options": _OPTIONS,
        "model": entries({}, {"reference": text, "type": text, "adapter": text}),
        "calibration": entries(
            {}, {"source": text, "shape": many(count), "sources": many(_SOURCE)}
        ),
        "scores": _SCORES, "seconds": amount, "peak_memory_bytes": named(amount),
        "sites": many(_SITE), "skipped": many(text), "problems": many(text), "created": text,
        "versions": named(text), "files": either(named(text), many(text)),
        "ranks": many(entries({"tokens": count, "solves": count, "solve_seconds": amount})),
    },
    {
        "structure": or_empty(_STRUCTURE), "recovery": or_empty(_RECOVERY),
        "routing": named(_ROUTED), "reapplied": named(anything), "earlier": named(anything),
        "timeline": entries(
            {},
            {
                "phases": many(row(text, amount)), "memory": many(row(amount, amount)),
                "end": amount,
            },
        ),
    },
)  # fmt: skip


def fault_of(record: Mapping[str, Any]) -> str:
    """The first fault of a report, such as ``sites[0].zeros is no count``; empty without one."""
    return _REPORT(dict(record)).removeprefix(".")
