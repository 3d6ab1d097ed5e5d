"""Kept weights rounded to integers, with a scale for each group of columns."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from apt.patterns import IntegerGrid, ScaleGroup, scales_of
from apt.runtime.matrix import MASK, SCALES, VALUES, Entry, Parts, encode

BITS = {"int8": 8, "int4": 4}
KINDS = {kind: IntegerGrid(bits).most for kind, bits in BITS.items()}
"""The kinds of integers, and the largest magnitude of each."""


def columns_of(group: ScaleGroup, weight: Tensor) -> int:
    """The number of columns of a weight (out, in) that share a scale."""
    return IntegerGrid(8, group).columns(weight.shape[1])


def nearest_integers(weight: Tensor, kind: str, group: ScaleGroup) -> tuple[Tensor, Tensor]:
    """The integers (out, in), int8, nearest to a matrix, and their scales (out, groups).

    Integers are symmetric around 0, with scales as in `apt.patterns.scales_of`.

    Args:
        kind: ``int8`` or ``int4``.
        group: the number of columns that share a scale, or a whole row.
    """
    grid, columns = IntegerGrid(BITS[kind], group), columns_of(group, weight)
    scales = scales_of(weight.float(), torch.ones(weight.shape[1]), grid, weight.dtype)
    integers = (
        (weight.float() / _scale_of_weights(scales, weight, columns))
        .round()
        .clamp(-grid.most, grid.most)
    )
    return integers.to(torch.int8), scales.to(weight.dtype)


def exact_integers(weight: Tensor, kind: str, group: ScaleGroup) -> tuple[Tensor, Tensor] | None:
    """The integers and scales of a matrix that consists of integers times scales; else None.

    Integers times scales give the same bytes. ``apt-prune prune --quantize`` writes such matrices:
    in each group of columns the largest weight is the scale times an integer near the maximum.
    """
    columns = columns_of(group, weight)
    scales = _exact_scales(weight, KINDS[kind], columns)
    if scales is None:
        return None
    integers = (weight.float() / _scale_of_weights(scales.float(), weight, columns)).round()
    return integers.to(torch.int8), scales


def encode_rounded(weight: Tensor, kind: str, group: ScaleGroup) -> tuple[Entry, Parts]:
    """A matrix (out, in) as its bitmask and its kept weights; see `nearest_integers`."""
    rounded = nearest_integers(weight, kind, group)
    return _encoded(weight, *rounded, kind, columns_of(group, weight))


def encode_integers(weight: Tensor, kind: str, group: ScaleGroup) -> tuple[Entry, Parts] | None:
    """A matrix as its bitmask and its exact integers; None without them; see `exact_integers`."""
    rounded = exact_integers(weight, kind, group)
    return None if rounded is None else _encoded(weight, *rounded, kind, columns_of(group, weight))


def _encoded(
    weight: Tensor, integers: Tensor, scales: Tensor, kind: str, group: int
) -> tuple[Entry, Parts]:
    entry, parts = encode(weight)
    kept = integers[weight != 0]
    values = kept if kind == "int8" else _packed_nibbles(kept)
    rounded = replace(entry, values=kind, group=group)
    return rounded, {MASK: parts[MASK], VALUES: values, SCALES: scales}


def _scale_of_weights(scales: Tensor, weight: Tensor, group: int) -> Tensor:
    """The scale of each weight (out, in)."""
    return scales.repeat_interleave(group, 1)[:, : weight.shape[1]]


def _packed_nibbles(integers: Tensor) -> Tensor:
    """Integers from −8 to 7 as halves of bytes, the lower half first."""
    padded = (
        torch.nn.functional.pad(integers + 8, (0, len(integers) % 2)).to(torch.uint8).view(-1, 2)
    )
    return padded[:, 0] | (padded[:, 1] << 4)


def _exact_scales(weight: Tensor, most: int, group: int) -> Tensor | None:
    """The scales (out, groups) with which integers give all weights exactly; None without them."""
    if not weight.isfinite().all():
        return None
    rows, columns = weight.shape
    groups = math.ceil(columns / group)
    padded = torch.nn.functional.pad(weight, (0, groups * group - columns))
    parts = padded.view(rows * groups, group)
    largest = parts.abs().amax(1)
    scales = torch.where(largest > 0, largest, torch.ones_like(largest))
    open_groups = (largest > 0).nonzero().squeeze(1)
    for level in range(most, 0, -1):
        candidate = (largest[open_groups].float() / level).to(weight.dtype)
        for direction in (None, math.inf, 0.0):  # and the neighbours of the rounded quotient
            scale = (
                candidate
                if direction is None
                else candidate.nextafter(torch.full_like(candidate, direction))
            )
            exact = _are_exact(parts[open_groups], scale, most)
            scales[open_groups[exact]] = scale[exact]
            open_groups, candidate = open_groups[~exact], candidate[~exact]
        if not len(open_groups):
            break
    return None if len(open_groups) else scales.view(rows, groups)


def _are_exact(weights: Tensor, scales: Tensor, most: int) -> Tensor:
    """True for each group (groups, group) whose stored weights are integers times its scale."""
    fp32_scales = scales.float().unsqueeze(1)
    integers = (weights.float() / fp32_scales).round()
    equal = ((integers * fp32_scales).to(weights.dtype) == weights) & (integers.abs() <= most)
    return equal.all(1) & (scales > 0)
