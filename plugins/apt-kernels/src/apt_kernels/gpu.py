"""Products with packed matrices on GPUs, in Triton.

The layout is that of the processor's kernels without their reordering: a bitmask (out, ⌈in / 8⌉)
and the kept values row by row. For each row and each part of `COLUMNS` columns, the position of the
first value is stored, so that all parts can be read in parallel.
"""

import torch
import triton
from torch import Tensor

from apt_kernels.triton_kernels import expand, multiply

COLUMNS = 512  # of a part; a power of two
_ONES = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.int32)


class GpuMatrix:
    """A packed matrix on a GPU, with the interface of `apt_kernels.Matrix`.

    Args:
        width: the number of columns.
        mask: the bitmask (out, ⌈in / 8⌉) of bytes.
        values: the kept values (kept,) of bf16, fp16, fp32 or int8, or pairs of int4 in bytes.
        scales: the scales (out, groups); None for floats.
        group: the number of columns that share a scale; 0 without scales.
    """

    def __init__(
        self, width: int, mask: Tensor, values: Tensor, scales: Tensor | None, group: int
    ) -> None:
        self.width, self.mask, self.values = width, mask.contiguous(), values.contiguous()
        self._scales, self._group = scales, group
        self._kind = {torch.int8: "int8", torch.uint8: "int4"}.get(values.dtype, "float")
        self._parts = triton.cdiv(width, COLUMNS)
        self._starts = _starts(self.mask, self._parts)

    def product(self, x: Tensor) -> Tensor:
        """Multiply vectors (n, in) → (n, out), in fp32; n is small."""
        count, rows = len(x), len(self.mask)
        if not count or not rows:
            return x.new_zeros(count, rows, dtype=torch.float32)
        padded = triton.next_power_of_2(count)
        given = torch.nn.functional.pad(x.contiguous(), (0, 0, 0, padded - count))
        y = torch.empty(padded, rows, dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            multiply[(rows,)](*self._parts_of(), given, y, rows, *self._sizes(), padded,
                               self._kind, self._group, COLUMNS)  # fmt: skip
        return y[:count]

    def expand(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows ``first`` to ``last`` with their zeros (last − first, in)."""
        dense = torch.empty(last - first, self.width, dtype=dtype, device=self.mask.device)
        if not dense.numel():
            return dense
        grid = (last - first, self._parts)
        with torch.cuda.device_of(dense):
            expand[grid](*self._parts_of(), dense, first, *self._sizes(), self._kind,
                          self._group, COLUMNS)  # fmt: skip
        return dense

    def _parts_of(self) -> tuple[Tensor, ...]:
        scales = self.values if self._scales is None else self._scales
        return self.mask, self.values, scales, self._starts

    def _sizes(self) -> tuple[int, ...]:
        groups = 0 if self._scales is None else self._scales.shape[1]
        return self.width, self.mask.shape[1], groups, self._parts


def _starts(mask: Tensor, parts: int) -> Tensor:
    """The position of the first value of each part (out, parts), int64."""
    counts = _ONES.to(mask.device)[mask.long()]
    padded = torch.nn.functional.pad(counts, (0, parts * COLUMNS // 8 - counts.shape[1]))
    each = padded.view(len(mask), parts, COLUMNS // 8).sum(2).flatten()
    return torch.cat([each.new_zeros(1), each.cumsum(0)[:-1]]).view(len(mask), parts).long()
