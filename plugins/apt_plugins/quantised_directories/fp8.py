"""FP8 with a scale for each block of 128 × 128, as the checkpoints of DeepSeek and Qwen have it.

The stored numbers are multiplied by ``weight_scale_inv``, in spite of its name.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from apt.checkpoints.safetensors_io import Entry
from apt.extending import ExpandedTensor
from apt_plugins.quantised_directories.arithmetic import (
    as_fp8,
    as_scales,
    fp8_scales,
    group_sizes,
    largest_of_groups,
    scale_grid,
    spread,
)
from apt_plugins.quantised_directories.format import Cut, Format, Parts, quantization_of


class BlockFp8(Format):
    """``quant_method`` fp8: blocks, rows, or one scale for a matrix; single or stacked matrices."""

    title = "FP8"
    marker = "_scale_inv"
    endings: ClassVar = {
        "values": "", "scales": "_scale_inv", "activations": "_activation_scale",
    }  # fmt: skip
    needed = ("values",)
    expanded_ending = ""

    @classmethod
    def description(cls, record: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The ``quantization_config`` of method fp8."""
        return quantization_of(record, "fp8")

    @property
    def _block(self) -> list[int]:
        """The sizes of blocks by the configuration; empty if it has none."""
        return [int(size) for size in self.quantization.get("weight_block_size") or []]

    def matrix(
        self, stem: str, entries: Mapping[str, Entry]
    ) -> tuple[ExpandedTensor, dict[str, Cut]]:
        """A matrix, or a stack of matrices."""
        values, scales = entries["values"], entries["scales"]
        if values.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
            raise ValueError(f"its numbers are {values.dtype}, not FP8")
        grid = scale_grid(scales.shape, len(values.shape))
        sizes = group_sizes(values.shape, grid, self._block)
        rows = Cut.ROWS if sizes[0] == 1 else Cut.NEVER
        cuts = {"values": Cut.ROWS, "scales": Cut.WHOLE if grid[0] == 1 else rows}
        if "activations" in entries:  # of a stack; a single matrix has none here
            per_matrix = entries["activations"].shape[:1] == values.shape[:1]
            cuts["activations"] = Cut.ROWS if per_matrix else Cut.WHOLE
        return ExpandedTensor(values.shape, self.dtype, "fp8"), cuts

    def expand(self, stem: str, shape: tuple[int, ...], parts: Parts) -> Tensor:
        """The numbers times the scales of their blocks."""
        scales = as_scales(parts["scales"])
        scales = scales.reshape(scale_grid(scales.shape, len(shape)))
        return parts["values"].float() * spread(scales, shape, self._block)

    def can_round(self, stem: str, roles: Iterable[str]) -> bool:
        """True for all matrices."""
        return True

    def rounded(self, stem: str, values: Tensor, stored: Parts) -> dict[str, Tensor]:
        """Numbers and scales by which the largest value of each block is the largest of FP8."""
        scales = stored["scales"]
        grid = scale_grid(scales.shape, values.ndim)
        sizes = group_sizes(stored["values"].shape, grid, self._block)
        grid = tuple(-(-n // size) for n, size in zip(values.shape, sizes, strict=True))
        largest = largest_of_groups(values, grid, sizes)
        power_of_two = self.quantization.get("scale_fmt") == "ue8m0"
        new_scales = fp8_scales(largest, scales.dtype, power_of_two)
        numbers = as_fp8(
            values / spread(as_scales(new_scales), values.shape, sizes), stored["values"].dtype
        )
        return {"values": numbers, "scales": new_scales.reshape(_shape(scales.shape, grid))}


def _shape(stored: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which new scales are stored."""
    return grid[: len(stored)]
