"""A packed matrix that torch expands: on GPUs, and where `apt_kernels` is not installed."""

import torch
from torch import Tensor

from apt.runtime.matrix import Entry

_ONES = torch.tensor([bin(byte).count("1") for byte in range(256)])  # of a byte


class ExpandedMatrix:
    """A matrix that torch expands: a bitmask (out, ⌈in / 8⌉), scales (out, groups) or None."""

    def __init__(self, entry: Entry, mask: Tensor, values: Tensor, scales: Tensor | None) -> None:
        self._entry, self._mask, self._values, self._scales = entry, mask, values, scales
        counts = _ONES.to(mask.device)[mask.long()].sum(1)
        self._starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).tolist()

    def expand(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows ``first`` to ``last`` with their zeros (last − first, in)."""
        shifts = torch.arange(8, device=self._mask.device, dtype=torch.uint8)
        bits = (self._mask[first:last, :, None] >> shifts) & 1
        kept = bits.view(last - first, -1)[:, : self._entry.columns].bool()
        dense = torch.zeros(kept.shape, dtype=dtype, device=kept.device)
        dense[kept] = self._read(self._starts[first], self._starts[last], kept, first).to(dtype)
        return dense

    def _read(self, start: int, end: int, kept: Tensor, first: int) -> Tensor:
        """The kept weights from ``start`` to ``end``."""
        if self._scales is None:
            return self._values[start:end]
        if self._entry.values == "int8":
            integers = self._values[start:end].to(torch.int32)
        else:
            pairs = self._values[start // 2 : -(-end // 2)].to(torch.int32)
            halves = torch.stack([pairs & 15, pairs >> 4], 1).reshape(-1)
            integers = halves[start % 2 : start % 2 + end - start] - 8
        rows, columns = kept.nonzero(as_tuple=True)
        scales = self._scales[rows + first, columns // self._entry.group]
        return integers.float() * scales.float()
