"""The command line's flags for the options that an error refers to."""

from collections.abc import Iterable

_IRREGULAR = {
    "bos": "--no-bos",
    "error_aware": "--error-aware/--layer-wise",
    "evaluation": "--eval",
    "metrics": "--metric",
    "ordered": "--ordered/--at-once",
    "overrides": "--override",
}


def flags_of(options: Iterable[str]) -> str:
    """`` (--samples, --seqlen)`` for options of these names; empty if there are none."""
    flags = [_IRREGULAR.get(name, f"--{name.replace('_', '-')}") for name in options]
    return f" ({', '.join(flags)})" if flags else ""
