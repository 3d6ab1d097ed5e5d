"""Ranges of option values. This module imports no torch, so that mistakes are reported at once."""

import math
import re
from collections.abc import Mapping
from typing import Any

from apt.errors import AptError

ACTIVATIONS = ("memory", "cpu", "disk")
DTYPES = ("float32", "bfloat16", "float16")
EFFORTS = ("fast", "default", "best")
_RANGES = {
    # Above this the Gram matrix has no effect, and fp32 overflows.
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
"""The largest value of each option of `apt.PruneOptions`, and its meaning. The smallest is 0."""

_SEEDS = (-(2**63), 2**64 - 1)  # the range of torch's generators


def check_amount(samples: int | None, seqlen: int, own_samples: int | None = None) -> None:
    """Raise for amounts that give no calibration samples. None for ``samples`` means all."""
    if min(samples or 0, own_samples or 0) < 0 or seqlen < 2:
        raise AptError(
            "samples and own samples must not be negative, and seqlen must be at least 2",
            options=("samples", "own_samples", "seqlen"),
        )
    if samples == 0 and not own_samples:
        raise AptError(
            "there are no samples to calibrate on",
            "use at least one sample or one own sample",
            ("samples", "own_samples"),
        )


def check_windows(count: int | None, seqlen: int, name: str = "samples") -> None:
    """Raise for amounts that give no windows.

    Args:
        count: the number of windows; None for all.
        seqlen: their tokens.
        name: the name of the option for ``count``.
    """
    if (count is not None and count < 1) or seqlen < 2:
        raise AptError(f"{name} must be at least 1 and seqlen at least 2", options=(name, "seqlen"))


def check_seed(seed: int) -> None:
    """Raise for a seed outside the range of torch's generators."""
    if not _SEEDS[0] <= seed <= _SEEDS[1]:
        raise AptError(
            f"seed {seed} is out of range", "give a whole number from 0 to 2**64 - 1", ("seed",)
        )


def check_prune_options(options: Mapping[str, Any]) -> None:
    """Raise if an option of `apt.PruneOptions` is out of range; None and no entry are in range."""
    if (effort := options["effort"]) not in EFFORTS:
        raise AptError(f"effort '{effort}' is not one of {', '.join(EFFORTS)}", options=("effort",))
    for name, (most, meaning) in _RANGES.items():
        value = options.get(name)
        if value is not None and not 0 <= value <= most:
            fault = f"{name.replace('_', ' ')} {value:g} is not a number from 0 to {most:g}"
            raise AptError(fault, meaning, (name,))
    check_integers(options.get("quantize"), options.get("group", 128))
    if (size := options.get("block_size")) is not None and size < 1:
        raise AptError(f"block size {size} is not positive", options=("block_size",))


def read_group(text: str) -> Any:
    """The value of an option for the columns that share a scale: a number, or ``row``.

    Raises:
        AptError: it is neither.
    """
    if text == "row":
        return text
    if not re.fullmatch(r"-?[0-9]+", text):
        raise AptError(f"group '{text}' is neither a number nor row", options=("group",))
    return int(text)


def check_integers(quantize: str | None, group: Any) -> None:
    """Raise for an unknown kind of integers, or a group that the kernels cannot use."""
    if quantize not in (None, "int8", "int4"):
        raise AptError(f"quantize '{quantize}' is not known", "write int8 or int4", ("quantize",))
    if group != "row" and (not isinstance(group, int) or group < 64 or group % 64):
        raise AptError(
            f"group {group} is not a multiple of 64", "write for example 128, or row", ("group",)
        )


def check_shard_size(size: str | None) -> None:
    """Raise if the size of a file has no number or no unit."""
    if size is None:
        return
    found = re.fullmatch(r"(\d+) ?[KMGT]B", size.strip().upper())
    if found is None or not int(found[1]):
        raise AptError(f"{size!r} is not a file size", "write 5GB or 500MB", ("max_shard_size",))


def check_dtype(name: str) -> None:
    """Raise for an unknown name of a dtype."""
    if name not in ("auto", *DTYPES):
        raise AptError(f"no dtype '{name}'", f"use auto, {', '.join(DTYPES)}", ("dtype",))


def check_activations(where: str, *, streamed: bool) -> None:
    """Raise for an unknown place of the activations, or for disk without streaming."""
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
