"""What plain option values may be. Nothing here imports torch, so that it is checked at once."""

import math
import re
from collections.abc import Mapping
from typing import Any

from apt.errors import AptError

ACTIVATIONS = ("memory", "cpu", "disk")
DTYPES = ("float32", "bfloat16", "float16")
EFFORTS = ("fast", "default", "best")
_RANGES = {
    # Beyond it the Gram matrix counts for nothing, and fp32 overflows.
    "damping": (1e6, "it is a share of the mean diagonal, such as 0.05"),
    "alpha": (1, "it is a share of an error, such as 0.25"),
    "beta": (1, "it is a share of an error, such as 0.25"),
    "row_importance": (2, "it is a power, such as 0.35"),
    "tuning_epochs": (1000, "it is a number of passes, such as 1"),
    "tuning_rate": (1, "it is a share of a weight's size, such as 0.05"),
    "tuning_tokens": (math.inf, "it is a number of tokens; 0 uses all"),
    "random_tokens": (100, "it is a number of copies for each sample, such as 0.25"),
    "own_samples": (math.inf, "it is a number of samples"),
}
"""The largest value of each option of `apt.PruneOptions`, the least being 0, and what it is."""

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


def check_ingredients(options: Mapping[str, Any]) -> None:
    """Raise where an option of `apt.PruneOptions` is out of range; None is always in range."""
    if (effort := options["effort"]) not in EFFORTS:
        raise AptError(f"effort '{effort}' is none of {', '.join(EFFORTS)}", options=("effort",))
    for name, (most, meaning) in _RANGES.items():
        value = options[name]
        if value is not None and not 0 <= value <= most:
            said = f"{name.replace('_', ' ')} {value:g} is not a number from 0 to {most:g}"
            raise AptError(said, meaning, (name,))
    if (size := options["block_size"]) is not None and size < 1:
        raise AptError(f"block size {size} is not positive", options=("block_size",))


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
