"""What plain option values may be. Nothing here imports torch, so that it is checked at once."""

import re

from apt.errors import AptError

ACTIVATIONS = ("memory", "cpu", "disk")
DTYPES = ("float32", "bfloat16", "float16")
_SEEDS = (-(2**63), 2**64 - 1)  # of torch's generators


def check_amount(samples: int | None, seqlen: int, own_samples: int | None = None) -> None:
    """Raise where there is nothing to calibrate or measure on; ``samples`` None is all there is."""
    if min(samples or 0, own_samples or 0) < 0 or seqlen < 2:
        raise AptError(
            "samples and own samples must not be negative, and seqlen must be at least 2",
            options=("samples", "own_samples", "seqlen"),
        )
    if samples == 0 and not own_samples:
        raise AptError(
            "there are no samples to calibrate on",
            "give at least one, or let the model write some",
            ("samples", "own_samples"),
        )


def check_windows(samples: int | None, seqlen: int) -> None:
    """Raise where there are no windows to measure or plan for; None is all there are."""
    if (samples is not None and samples < 1) or seqlen < 2:
        raise AptError(
            "samples must be at least 1 and seqlen at least 2", options=("samples", "seqlen")
        )


def check_seed(seed: int) -> None:
    """Raise for a seed that no generator of torch takes."""
    if not _SEEDS[0] <= seed <= _SEEDS[1]:
        raise AptError(
            f"seed {seed} is out of range", "give a whole number from 0 to 2**64 - 1", ("seed",)
        )


def check_shard_size(size: str | None) -> None:
    """Raise where the size of a file has no number or no unit."""
    if size is None:
        return
    found = re.fullmatch(r"(\d+) ?[KMGT]B", size.strip().upper())
    if found is None or not int(found[1]):
        raise AptError(f"{size!r} is no size of a file", "write 5GB or 500MB", ("max_shard_size",))


def check_dtype(name: str) -> None:
    """Raise for the name of no precision."""
    if name not in ("auto", *DTYPES):
        raise AptError(f"no dtype '{name}'", f"use auto, {', '.join(DTYPES)}", ("dtype",))


def check_activations(where: str, *, streamed: bool) -> None:
    """Raise where activations cannot be kept in a place of that name."""
    if where not in ACTIVATIONS:
        raise AptError(
            f"activations cannot be kept in '{where}'",
            f"use {', '.join(ACTIVATIONS)}",
            ("activations",),
        )
    if where == "disk" and not streamed:
        raise AptError(
            "activations are kept on disk by streamed runs only",
            "stream the run as well",
            ("activations", "stream"),
        )
