"""The command line's flags for the options that an error speaks of."""

from collections.abc import Iterable

_OTHERWISE = {
    "bos": "--no-bos",
    "error_aware": "--error-aware/--layer-wise",
    "evaluation": "--eval",
    "metrics": "--metric",
    "ordered": "--ordered/--at-once",
    "overrides": "--override",
}


def flags_of(options: Iterable[str]) -> str:
    """`` (--samples, --seqlen)`` for the options of these names; empty where there are none."""
    flags = [_OTHERWISE.get(name, f"--{name.replace('_', '-')}") for name in options]
    return f" ({', '.join(flags)})" if flags else ""
