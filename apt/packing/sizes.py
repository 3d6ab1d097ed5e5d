"""The bytes of packed matrices in their files, before and after their values are known."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apt.layouts.pieces import Piece
from apt.patterns import IntegerGrid
from apt.runtime.matrix import MASK, SCALES, VALUES, encode
from apt.runtime.packed_file import CHECKSUMS

_CODING = 1.02
"""The bits of a Huffman code of the bytes of a random mask, relative to its entropy."""
_LEAST_CODE = 1 / 8
"""The bits for each weight of a mask without zeros: a Huffman code has a bit for each byte."""
_FILE = 64
"""The bytes of a file that are in no tensor's part of its header, at most, without metadata."""


@dataclass(frozen=True)
class StoredMatrices:
    """The stored matrices of one parameter.

    Attributes:
        pieces: the stored tensors, and their places in the parameter.
        shapes: the shape of each of these tensors, (out, in) or (count, out, in).
        dtype: the dtype in which they are stored.
        digits: the number of digits of the largest offset in a file.
        split: the number of tensors into which a writer may split each of them.
        in_memory: True to count the bytes of a loaded model: plain masks, and no headers.
    """

    pieces: Sequence[Piece]
    shapes: Sequence[tuple[int, ...]]
    dtype: torch.dtype
    digits: int
    split: int = 1
    in_memory: bool = False

    @property
    def weights(self) -> int:
        """The number of weights."""
        return sum(map(math.prod, self.shapes))

    @property
    def dense(self) -> int:
        """The bytes of the dense tensors."""
        return self.weights * self.dtype.itemsize + self._headers("")

    def largest(self, kept: int, grid: IntegerGrid | None) -> int:
        """The bytes of the packed matrices at most: with a bit of the mask for each weight.

        Args:
            kept: the largest number of kept weights.
            grid: the grid of the kept weights; None for their dtype.
        """
        return self._mask + self._values(kept, grid) + self._others(grid)

    def expected(self, zeros: float, grid: IntegerGrid | None) -> int:
        """The bytes for a share of zeros at random places, packed if that is smaller."""
        kept = math.ceil(self.weights * (1 - zeros))
        coding = 1.0 if self.in_memory else _CODING * max(_entropy(zeros), _LEAST_CODE)
        mask = self._mask * min(1.0, coding)
        return min(self.dense, math.ceil(mask) + self._values(kept, grid) + self._others(grid))

    def coded(self, parameter: Tensor, grid: IntegerGrid | None) -> int:
        """The bytes of a parameter with its final values, packed if that is smaller."""
        size = self._others(grid)
        for piece in self.pieces:
            matrix = piece.to_stored(parameter.detach()).to(self.dtype).flatten(0, -2)
            entry, _ = encode(matrix)
            is_plain = self.in_memory or self.split > 1
            size += entry.mask_bytes if is_plain else entry.stored
            size += self._values(entry.kept, grid)
        return min(self.dense, size)

    @property
    def _mask(self) -> int:
        return sum(math.prod(shape[:-1]) * math.ceil(shape[-1] / 8) for shape in self.shapes)

    def _values(self, kept: int, grid: IntegerGrid | None) -> int:
        if grid is None:
            return kept * self.dtype.itemsize
        return math.ceil(kept * grid.bits / 8) + len(self.pieces) * self.split

    def _others(self, grid: IntegerGrid | None) -> int:
        """The bytes of the scales, and of the headers of all parts."""
        names = (MASK, VALUES) if grid is None else (MASK, VALUES, SCALES)
        scales = 0
        for shape in self.shapes if grid is not None else ():
            assert grid is not None
            groups = math.ceil(shape[-1] / grid.columns(shape[-1]))
            scales += math.prod(shape[:-1]) * groups * self.dtype.itemsize
        return scales + self._described + sum(self._headers(f"_{name}") for name in names)

    @property
    def _described(self) -> int:
        """The bytes of the checksums of the descriptions of the matrices."""
        if self.in_memory:
            return 0
        return sum(_checksum(piece.key) for piece in self.pieces) * self.split

    def _headers(self, suffix: str) -> int:
        if self.in_memory:
            return 0
        return sum(
            header_bytes(f"{piece.key}{suffix}", shape, self.digits) * self.split
            for piece, shape in zip(self.pieces, self.shapes, strict=True)
        )


def header_bytes(name: str, shape: Sequence[int], digits: int, *, checked: bool = True) -> int:
    """The bytes of a tensor in the header of a file at most.

    Args:
        digits: the number of digits of the largest offset.
        checked: True for a file with checksums.
    """
    numbers = sum(len(str(size)) + 1 for size in shape) + digits  # packed values have one dimension
    fields = len('":{"dtype":"BF16","shape":[],"data_offsets":[,]},"') + 2 * digits
    return len(json.dumps(name)) + fields + numbers + (_checksum(name) if checked else 0)


def file_bytes(metadata: Mapping[str, str] | None) -> int:
    """The bytes of a file at most, without its tensors and their parts of the header."""
    return _FILE + len(json.dumps({**(metadata or {}), CHECKSUMS: ""}))


def _checksum(name: str) -> int:
    """The bytes of a checksum in the metadata of a file: JSON in a text of JSON."""
    return len(json.dumps(json.dumps({name: "0" * 8})))


def _entropy(share: float) -> float:
    """The entropy in bits of a bit that is 0 with this probability."""
    return -sum(p * math.log2(p) for p in (share, 1 - share) if p > 0)
