"""Small integers in the bits of bytes, scales of groups, and the numbers of FP4."""

from collections.abc import Sequence

import torch
from torch import Tensor

_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_FP4 = torch.cat([_FP4, -_FP4])
"""The 16 values of FP4 (one bit of sign, two of exponent, one of mantissa) by their codes."""

_EXPONENT_BIAS = 127
_POWERS = (torch.arange(256, dtype=torch.int32) << 23).view(torch.float32)  # 2 ** (byte - 127)
_POWERS[0] = 2.0**-_EXPONENT_BIAS

_LARGEST_FP8 = 448.0


def grouped(values: Tensor, size: int) -> Tensor:
    """Values (…, n) in groups of the last dimension: (…, n / size, size)."""
    return values.reshape(*values.shape[:-1], -1, size)


def unpacked(stored: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` integers of each row, which are packed without gaps, lowest bits first.

    Args:
        stored: (…, words) of any integer dtype.
        bits: the number of bits of each integer, 1 to 8.
        count: the number of integers of a row.

    Returns:
        uint8 (…, count).
    """
    data = stored.contiguous().view(torch.uint8)
    if bits == 8:
        return data[..., :count]
    if bits == 4:
        return torch.stack([data & 15, data >> 4], -1).flatten(-2)[..., :count]
    data = torch.nn.functional.pad(data, (0, -data.shape[-1] % bits))
    groups = grouped(data, bits).to(torch.int64)  # 8 integers in each group of bytes
    words = sum(groups[..., index] << (8 * index) for index in range(bits))
    assert isinstance(words, Tensor)
    values = torch.stack([(words >> (index * bits)) & (2**bits - 1) for index in range(8)], -1)
    return values.flatten(-2).to(torch.uint8)[..., :count]


def packed(values: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `unpacked`: rows of words of a dtype, the last of which may end with zeros."""
    words = -(-values.shape[-1] * bits // (8 * dtype.itemsize))
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % 8))
    groups = grouped(padded, 8).to(torch.int64)
    joined = sum(groups[..., index] << (index * bits) for index in range(8))
    assert isinstance(joined, Tensor)
    row_bytes = torch.stack([(joined >> (8 * index)) & 255 for index in range(bits)], -1)
    data = row_bytes.flatten(-2).to(torch.uint8)
    size = words * dtype.itemsize
    data = torch.nn.functional.pad(data, (0, max(0, size - data.shape[-1])))
    return data[..., :size].contiguous().view(dtype)


def group_sizes(
    shape: Sequence[int], grid: Sequence[int], configured: Sequence[int] = ()
) -> list[int]:
    """The size of a group in each dimension of a matrix, by the shape of its grid of scales.

    Args:
        shape: the shape of the matrix.
        grid: the shape of the scales, with as many dimensions.
        configured: the sizes of groups by the configuration, for the last dimensions; 0 for an
            unknown size.

    Raises:
        ValueError: the grid does not fit the matrix.
    """
    all_configured = [*[0] * (len(shape) - len(configured)), *configured][-len(shape) :]
    sizes = []
    for size, count, group in zip(shape, grid, all_configured, strict=True):
        if group and -(-size // group) == count:
            sizes.append(group)
        elif not group and count and size % count == 0:
            sizes.append(size // count)
        else:
            raise ValueError(f"scales of shape {tuple(grid)} for {tuple(shape)}")
    return sizes


def scale_grid(shape: Sequence[int], count: int) -> tuple[int, ...]:
    """The shape of scales, extended to ``count`` dimensions, those of the matrix.

    Raises:
        ValueError: the scales have more dimensions.
    """
    if len(shape) > count:
        raise ValueError(f"scales of shape {tuple(shape)}")
    return (*shape, *[1] * (count - len(shape)))


def spread(scales: Tensor, shape: Sequence[int], configured: Sequence[int] = ()) -> Tensor:
    """Scales for each value of a matrix, from a grid of scales; see `group_sizes`."""
    for dim, size in enumerate(group_sizes(shape, scales.shape, configured)):
        if scales.shape[dim] not in (1, shape[dim]):
            scales = scales.repeat_interleave(size, dim).narrow(dim, 0, shape[dim])
    return scales


def largest_of_groups(values: Tensor, grid: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """The largest absolute value of each group of a matrix.

    Args:
        values: the matrix, of n dimensions.
        grid: the number of groups in each dimension.
        sizes: the size of a group in each dimension; the last groups may be smaller.
    """
    widths: list[int] = []
    for size, count, group in reversed(list(zip(values.shape, grid, sizes, strict=True))):
        widths += [0, count * group - size]
    largest: Tensor = torch.nn.functional.pad(values.abs(), widths)
    for dim in range(values.ndim):
        groups = (grid[dim], sizes[dim])
        largest = largest.reshape(*largest.shape[:dim], *groups, *largest.shape[dim + 1 :])
        largest = largest.amax(dim + 1)
    return largest


def fp8_scales(largest: Tensor, dtype: torch.dtype, power_of_two: bool = False) -> Tensor:
    """The scales by which groups of values are divided for FP8, in the dtype of stored scales."""
    scales = torch.where(largest > 0, largest / _LARGEST_FP8, torch.ones_like(largest))
    if power_of_two or dtype.itemsize == 1:
        scales = scales.log2().ceil().exp2()
    if dtype == torch.uint8:
        return (scales.log2() + _EXPONENT_BIAS).to(dtype)
    return scales.to(dtype)


def as_scales(stored: Tensor) -> Tensor:
    """Stored scales in fp32; bytes are exponents of two."""
    if stored.dtype == torch.uint8:
        return _POWERS[stored.int()]
    return stored.float()


def as_fp8(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest numbers of FP8."""
    return values.clamp(-_LARGEST_FP8, _LARGEST_FP8).to(dtype)


def fp4(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of FP4 in bytes (…, n), the lower half first: (…, 2 · n)."""
    codes = torch.arange(256)
    pairs = torch.stack([_FP4[codes & 15], _FP4[codes >> 4]], -1).to(dtype)
    return torch.nn.functional.embedding(stored.int(), pairs).flatten(-2)


def as_mxfp4(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest numbers of FP4 for groups of values (…, n), and the bytes of their scales (…).

    The scale is the power of two by which the largest value of a group lies from 4 to 8, as the
    specification of the MX formats has it.
    """
    largest = groups.abs().amax(-1)
    exponents = (largest.frexp().exponent - 3).clamp(-_EXPONENT_BIAS, _EXPONENT_BIAS)
    scales = torch.where(largest > 0, exponents + _EXPONENT_BIAS, 0).to(torch.uint8)
    values = groups / as_scales(scales).unsqueeze(-1)
    codes = (
        torch.bucketize(values.abs().contiguous(), (_FP4[:7] + _FP4[1:8]) / 2)
        + 8 * values.signbit()
    )
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8), scales
