"""The types of the entries of a report. A report is checked once, when it is read."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

Check = Callable[[Any], str]
"""A check of a value. It returns the end of a message, such as `` is no text``, or empty."""

_MOST, _LARGEST = 2**63 - 1, 1e305  # the limits of a count, and of a number such as a perplexity
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


def flag(value: Any) -> str:
    """True or false."""
    return "" if isinstance(value, bool) else " is neither true nor false"


def optional(check: Check) -> Check:
    """A value, or null."""
    return lambda value: "" if value is None else check(value)


def either(*checks: Check) -> Check:
    """A value that passes one of the checks."""
    return lambda value: "" if not all(check(value) for check in checks) else checks[0](value)


def anything(value: Any) -> str:
    """Any value."""
    return ""


def list_of(check: Check) -> Check:
    """A list of values."""

    def problem(value: Any) -> str:
        if not isinstance(value, list):
            return " is no list"
        return _first((f"[{place}]", check(item)) for place, item in enumerate(value))

    return problem


def row_of(*checks: Check) -> Check:
    """A list with a value for each check."""

    def problem(value: Any) -> str:
        if not isinstance(value, list) or len(value) != len(checks):
            return f" is no list of {len(checks)} values"
        pairs = zip(checks, value, strict=True)
        return _first((f"[{place}]", check(item)) for place, (check, item) in enumerate(pairs))

    return problem


def object_of(check: Check) -> Check:
    """An object with values of one kind."""

    def problem(value: Any) -> str:
        if not isinstance(value, dict):
            return " is no object"
        return _first((f".{name}", check(item)) for name, item in value.items())

    return problem


def object_with(required: Mapping[str, Check], others: Mapping[str, Check] | None = None) -> Check:
    """An object with the required entries. It may lack the others, and may have more entries."""
    checks = {**required, **(others or {})}

    def problem(value: Any) -> str:
        if not isinstance(value, dict):
            return " is no object"
        if missing := [name for name in required if name not in value]:
            return f".{missing[0]} is missing"
        return _first((f".{n}", check(value[n])) for n, check in checks.items() if n in value)

    return problem


def _first(problems: Iterable[tuple[str, str]]) -> str:
    """The first problem, after the place of its value."""
    return next((f"{place}{problem}" for place, problem in problems if problem), "")


def or_empty(check: Check) -> Check:
    """A value that passes the check, or an empty object."""
    return lambda value: "" if value == {} else check(value)


_NAMES = optional(list_of(text))
_SCORES = object_with(
    {}, {"before": object_of(number), "after": object_of(number), "source": optional(text)}
)
_KEPT = object_with({"kept": count, "of": count})
_OPTIONS = object_with(
    {},
    {
        "pattern": optional(text), "only": _NAMES, "skip": _NAMES, "also": _NAMES,
        "overrides": optional(object_of(text)), "per": optional(text),
        "allocation": optional(text), "method": optional(text), "model": optional(text),
        "output": optional(text),
        "quantize": optional(text), "group": either(count, text),
        "shrink": optional(object_of(anything)),
    },
)  # fmt: skip
_SITE = object_with(
    {
        "name": text, "kind": text, "pattern": text, "shape": row_of(size, size), "zeros": count,
        "tokens": count, "relative_error": number, "seconds": amount,
        "damping": optional(number), "residual": optional(number),
    },
    {"order": optional(list_of(count))},
)  # fmt: skip
_STRUCTURE = object_with(
    {"blocks": _KEPT, "groups": object_of(_KEPT), "share": number},
    { "experts": object_of(
            object_with(
                {"removed": list_of(count), "merged": list_of(row_of(count, count))},
                {
                    "scores": list_of(number), "underserved": list_of(count),
                    "unprotected": list_of(count),
                },
            )
        ),
        "rounded": object_of(text),
        "candidates": list_of(
            object_with(
                {"loss": number, "share": number, "blocks": count, "groups": object_of(count)}
            )
        ),
    },
)  # fmt: skip
_TABLE = object_with(
    {
        "rest": count, "gradient": number,
        "tensors": object_of(list_of(row_of(text, count, number, number))),
    }
)  # fmt: skip
_CANDIDATE = object_with(
    {
        "means": text, "share": number, "kept": object_of(count), "predicted": optional(number),
        "measured": optional(number), "chosen": flag,
    }
)  # fmt: skip
_ANY_FIT: dict[str, Check] = {
    "size": size, "loss": number, "levels": object_of(text), "table": _TABLE,
}  # fmt: skip
_SIZE_FIT = object_with(
    {**_ANY_FIT, "budget": size, "frontier": list_of(row_of(count, number))},
    {"expected": count, "candidates": list_of(_CANDIDATE)},
)
_SPEED = object_with(
    {
        "goal": number, "measured": number, "dense": number, "highest": number,
        "trials": list_of(row_of(number, number)), "prompt": size, "threads": size,
    }
)  # fmt: skip
_SPEED_FIT = object_with({**_ANY_FIT, "speed": _SPEED, "frontier": list_of(row_of(number, number))})


def _fit(value: Any) -> str:
    """The entry of a fit to a size, or to a speed."""
    is_speed = isinstance(value, Mapping) and "speed" in value
    return (_SPEED_FIT if is_speed else _SIZE_FIT)(value)


_ROUTED = object_with({"tokens": object_of(list_of(count)), "weights": object_of(list_of(number))})
_SOURCE = object_with({"name": text, "share": number, "samples": count})
_TRAINING = object_with(
    {"tokens": count, "held_back": list_of(row_of(count, number)), "losses": list_of(number)},
    {"best": count, "diverged": optional(count)},
)
_TIMELINE = object_with(
    {},
    {
        "phases": list_of(row_of(text, amount)), "memory": list_of(row_of(amount, amount)),
        "end": amount,
    },
)  # fmt: skip

_EXPORT = object_with(
    {}, {"type": text, "tensors": count, "size": count, "zeros": count, "kept": count}
)

_RECOVERY = object_with(
    {},
    {
        "training": _TRAINING, "options": object_with({"kind": text}),
        "parameters_before": count, "rate": number, "dense_loss": optional(number), "zeros": count,
        "scores": _SCORES, "timeline": _TIMELINE, "earlier": object_of(anything),
        "seconds": amount,
    },
)  # fmt: skip

_REPORT = object_with(
    {
        "schema": count, "options": _OPTIONS,
        "model": object_with({}, {"reference": text, "type": text, "adapter": text}),
        "calibration": object_with(
            {}, {"source": text, "shape": list_of(count), "sources": list_of(_SOURCE)}
        ),
        "scores": _SCORES, "seconds": amount, "peak_memory_bytes": object_of(amount),
        "sites": list_of(_SITE), "skipped": list_of(text), "problems": list_of(text),
        "created": text, "versions": object_of(text),
        "files": either(object_of(text), list_of(text)),
        "ranks": list_of(object_with({"tokens": count, "solves": count, "solve_seconds": amount})),
    },
    {
        "structure": or_empty(_STRUCTURE), "recovery": or_empty(_RECOVERY),
        "routing": object_of(_ROUTED), "fit": or_empty(_fit), "norms": object_of(anything),
        "reapplied": object_of(anything),
        "export": or_empty(_EXPORT), "earlier": object_of(anything), "timeline": _TIMELINE,
    },
)  # fmt: skip


def first_problem(record: Mapping[str, Any]) -> str:
    """The first problem of a report, such as ``sites[0].zeros is no count``; empty if none."""
    return _REPORT(dict(record)).removeprefix(".")
