"""Compressed-tensors: packed integers of 4 or 8 bits, single bytes, and FP8.

The supported formats are ``pack-quantized``, ``int-quantized``, ``float-quantized`` and
``naive-quantized``.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from apt.checkpoints.safetensors_io import Entry
from apt.errors import AptError
from apt.extending import ExpandedTensor
from apt_plugins.quantised_directories.arithmetic import (
    as_fp8,
    fp8_scales,
    group_sizes,
    largest_of_groups,
    packed,
    scale_grid,
    spread,
    unpacked,
)
from apt_plugins.quantised_directories.format import (
    Cut,
    Format,
    Parts,
    check_floats,
    check_words,
    damaged,
    quantization_of,
    unsupported,
)

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense")
_MIXED = "mixed-precision"  # each group of modules has a format of its own
_BITS = (2, 4, 8)  # others were packed in several ways by releases of compressed-tensors


class CompressedTensors(Format):
    """``quant_method`` compressed-tensors."""

    title = "compressed-tensors"
    marker = "weight_scale"
    endings: ClassVar = {
        "packed": "weight_packed", "values": "weight", "scales": "weight_scale",
        "zeros": "weight_zero_point", "shape": "weight_shape", "order": "weight_g_idx",
    }  # fmt: skip
    needed = ()

    @classmethod
    def description(cls, record: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The ``quantization_config`` of method compressed-tensors."""
        quantization = quantization_of(record, "compressed-tensors")
        if quantization is None:
            return None
        groups = [group for group in _groups(quantization) if group.get("format") is not None]
        kinds = [str(group.get("format")) for group in [quantization, *groups]]
        if groups and kinds[0] == _MIXED:
            kinds = kinds[1:]
        if other := [kind for kind in kinds if kind not in _FORMATS]:
            raise unsupported(f"compressed-tensors with the format {other[0]}")
        return quantization

    def matrix(
        self, stem: str, entries: Mapping[str, Entry]
    ) -> tuple[ExpandedTensor, dict[str, Cut]]:
        """A matrix, or a stack of matrices that are packed one by one."""
        numbers = entries.get("packed") or entries["values"]
        shape = numbers.shape
        stored = "fp8" if numbers.dtype.is_floating_point else "int8"
        check_floats(entries["scales"])
        if "packed" in entries:
            check_words(numbers, *([entries["zeros"]] if "zeros" in entries else []))
            shape = self._shape(stem, numbers.shape)
            stored = f"int{self._bits(shape[-1], numbers.shape[-1])}"
        grid = scale_grid(entries["scales"].shape, len(shape))
        sizes = group_sizes(shape, grid, self._block)
        scales_cut = Cut.WHOLE if grid[0] == 1 else Cut.ROWS if sizes[0] == 1 else Cut.NEVER
        _check_zeros(entries, shape, grid, stored)
        zeros_cut = Cut.NEVER if "packed" in entries and len(shape) == 2 else scales_cut
        cuts = {
            "packed": Cut.ROWS, "values": Cut.ROWS, "scales": scales_cut, "zeros": zeros_cut,
            "shape": Cut.SHAPE, "order": Cut.WHOLE,
        }  # fmt: skip
        cuts = {role: cut for role, cut in cuts.items() if role in entries}
        return ExpandedTensor(shape, entries["scales"].dtype, stored), cuts

    def expand(self, stem: str, shape: tuple[int, ...], parts: Parts) -> Tensor:
        """The integers less their zero points, or the numbers of FP8, times the scales."""
        scales, zeros = parts["scales"], parts.get("zeros")
        grid = scale_grid(scales.shape, len(shape))
        if "packed" in parts:
            bits = self._bits(shape[-1], parts["packed"].shape[-1])
            values = unpacked(parts["packed"], bits, shape[-1]).float() - 2 ** (bits - 1)
            if zeros is not None:
                columns = unpacked(zeros.transpose(-1, -2), bits, shape[-2])
                zeros = columns.transpose(-1, -2).float() - 2 ** (bits - 1)
        else:
            values = parts["values"].float()
        scales = self._spread(stem, scales.float().reshape(grid), shape, parts.get("order"))
        if zeros is not None:
            zeros_of_values = self._spread(
                stem, zeros.float().reshape(grid), shape, parts.get("order")
            )
            values = values - zeros_of_values
        return scales.mul(values)

    def can_round(self, stem: str, roles: Iterable[str]) -> bool:
        """True without zero points, and if each group consists of neighbouring columns."""
        return not {"zeros", "order"}.intersection(roles)

    def rounded(self, stem: str, values: Tensor, stored: Parts) -> dict[str, Tensor]:
        """Symmetric integers or FP8; the scale of a group follows from its largest value."""
        dtype = stored["scales"].dtype
        numbers = stored["values"] if "values" in stored else stored["packed"]
        rows = (numbers.shape[0], *values.shape[1:])
        grid = scale_grid(stored["scales"].shape, values.ndim)
        sizes = group_sizes(rows, grid, self._block)
        grid = tuple(-(-n // size) for n, size in zip(values.shape, sizes, strict=True))
        largest = largest_of_groups(values, grid, sizes)
        new_shape = grid[: stored["scales"].ndim]
        if numbers.dtype.is_floating_point:
            scales = fp8_scales(largest, dtype)
            scales_of_values = spread(scales.float(), values.shape, sizes)
            return {
                "values": as_fp8(values / scales_of_values, numbers.dtype),
                "scales": scales.reshape(new_shape),
            }  # fmt: skip
        bits = self._bits(values.shape[-1], numbers.shape[-1]) if "packed" in stored else 8
        half = 2 ** (bits - 1)
        scales = torch.where(largest > 0, largest / (half - 0.5), torch.ones_like(largest))
        scales = scales.to(dtype)
        scales_of_values = spread(scales.float(), values.shape, sizes)
        integers = (values / scales_of_values).round().clamp(-half, half - 1)
        new_scales = {"scales": scales.reshape(new_shape)}
        if "packed" not in stored:
            return {"values": integers.to(torch.int8), **new_scales}
        return {
            "packed": packed((integers + half).to(torch.uint8), bits, torch.int32),
            "shape": torch.tensor(values.shape, dtype=stored["shape"].dtype), **new_scales,
        }  # fmt: skip

    @property
    def _block(self) -> list[int]:
        """The sizes of blocks by the configuration; empty if groups of modules differ."""
        weights = [group.get("weights") or {} for group in _groups(self.quantization)]
        blocks = [each.get("block_structure") or (1, each.get("group_size")) for each in weights]
        strategies = {str(each.get("strategy", "group")) for each in weights}
        if not strategies <= {"group", "block"} or any(each != blocks[0] for each in blocks):
            return []
        return [size for size in blocks[0] if isinstance(size, int) and size > 0]

    def _shape(self, stem: str, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a packed matrix, which is stored beside it."""
        key = f"{stem}{self.endings['shape']}"
        if key not in self.shards:
            raise ValueError(f"{key} is missing")
        shape = tuple(int(size) for size in self.shards.read(key).flatten().tolist())
        if len(shape) != len(stored) or shape[:-1] != stored[:-1]:
            raise ValueError(f"{key} is {shape}, with numbers of shape {stored}")
        return shape

    def _bits(self, columns: int, words: int) -> int:
        """The number of bits of packed integers: a configured one that fits the number of words."""
        configured = {
            (group.get("weights") or {}).get("num_bits") for group in _groups(self.quantization)
        }
        fitting = [bits for bits in _BITS if -(-columns * bits // 32) == words]
        possible = [bits for bits in fitting if bits in configured]
        if not possible:
            raise ValueError(f"{columns} columns in {words} words of 32 bits")
        return possible[0]

    def _spread(
        self, stem: str, grid: Tensor, shape: tuple[int, ...], order: Tensor | None
    ) -> Tensor:
        """Scales or zero points for each column, whose group may be given by an index."""
        if order is None or int(order.min()) < 0:
            return spread(grid, shape, self._block)
        if order.shape != shape[-1:] or int(order.max()) >= grid.shape[-1]:
            raise damaged(f"{stem}{self.endings['order']}", "it names groups that do not exist")
        return grid[..., order.long()]


def _check_zeros(
    entries: Mapping[str, Entry], shape: tuple[int, ...], grid: tuple[int, ...], stored: str
) -> None:
    """Raise `ValueError` if zero points, which are packed along the rows, do not fit the scales."""
    if "zeros" not in entries:
        return
    zeros_shape, expected = scale_grid(entries["zeros"].shape, len(shape)), grid
    if "packed" in entries:
        words = -(-grid[-2] * int(stored.removeprefix("int")) // 32)
        expected = (*grid[:-2], words, grid[-1])
    if zeros_shape != expected:
        raise ValueError(f"zero points of shape {zeros_shape} with scales of {grid}")


def _groups(quantization: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The groups of modules of a ``quantization_config``."""
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        if not isinstance(group, dict):
            raise AptError("config_groups of quantization_config is damaged", "get it again")
        yield group
