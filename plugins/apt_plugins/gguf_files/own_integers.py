"""Matrices that consist of integers of 4 bits, with these integers in the file.

The quantiser of the package gguf takes the weight of the largest magnitude in a block for its
scale, and rounds all others again. A model that was made with ``--quantize int4`` has integers.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from apt.runtime.rounding import exact_integers

BLOCK = 32
"""The columns that share a scale in ``q4_0``."""

_NARROW = 2.0**-9  # the error of a scale in fp16, relative to it: half a step of bf16


def as_q4_0(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
    """The bytes (…, in / 32 · 18) of a matrix (…, in) in fp32 as ``q4_0``.

    Each block has its scale in fp16, then its integers plus 8 as halves of bytes: the first 16 are
    the lower halves.

    Returns:
        None for a matrix that does not consist of integers from −7 to 7 times a scale for each
        block, or has a scale that fp16 cannot express.
    """
    stored = _as_stored(torch.from_numpy(values).flatten(0, -2))
    first = exact_integers(stored[:8], "int4", BLOCK)  # most matrices end here, after little work
    found = first and exact_integers(stored, "int4", BLOCK)
    if found is None:
        return None
    integers, scales = found[0], found[1].float()
    half = scales.half()
    if ((half.float() - scales).abs() > _NARROW * scales).any():
        return None
    rows, groups = scales.shape
    levels = (integers + 8).to(torch.uint8).view(rows, groups, 2, BLOCK // 2)
    halves = levels[:, :, 0] | (levels[:, :, 1] << 4)
    written = torch.cat([half.view(rows, groups, 1).view(torch.uint8), halves], 2)
    return written.view(*values.shape[:-1], -1).numpy()


def _as_stored(values: Tensor) -> Tensor:
    """Values in the narrowest dtype that has them: products were rounded to it."""
    for dtype in (torch.bfloat16, torch.float16):
        narrow = values.to(dtype)
        if torch.equal(narrow.float(), values):
            return narrow
    return values
