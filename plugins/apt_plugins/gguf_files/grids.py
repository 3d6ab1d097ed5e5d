"""The types of GGUF as grids: blocks of columns with a scale, as llama.cpp decodes them.

A point is computed in fp32 as llama.cpp computes it, so that a file decodes to the points exactly.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from apt.patterns import Grid, Points
from apt_plugins.gguf_files.bit_fields import half_bytes, shared_bytes, six_bit_pairs
from apt_plugins.gguf_files.scale_search import (
    Levels,
    Weights,
    clips,
    half_pairs,
    half_scales,
    searched,
    where,
)
from apt_plugins.gguf_files.super_blocks import Integers, shared_pairs, shared_scales

_CHUNK = 2**20  # weights that are encoded at a time


def _between(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(torch.linspace(first, last, count).tolist())


_LEVELS = {
    Type.Q8_0: Levels.between(-127, 127),
    Type.Q6_K: Levels.between(-32, 31),
    Type.Q5_0: Levels.between(-16, 15),
    Type.Q4_0: Levels.between(-8, 7),
    Type.Q3_K: Levels.between(-4, 3),
    Type.IQ4_NL: Levels((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)),
    Type.MXFP4: Levels((-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12)),
}
_LEVELS[Type.IQ4_XS] = _LEVELS[Type.IQ4_NL]

# The ratios of the weight of the largest magnitude to the scale that are tried, for both signs of
# the scale. The largest weights are clipped by a ratio beyond the levels.
_ENDS = {
    Type.Q8_0: _between(122, 130, 32),
    Type.Q6_K: (*_between(-34, -31, 10), *_between(30, 33.5, 10)),
    Type.Q5_0: (*_between(-21, -14, 22), *_between(13, 20, 20)),
    Type.Q4_0: (*_between(-12, -6, 19), *_between(5, 11, 18)),
    Type.Q3_K: (*_between(-6.5, -3, 18), *_between(2.5, 5.5, 14)),
    Type.IQ4_NL: (*_between(-165, -100, 18), *_between(90, 150, 16)),
}
_ENDS[Type.IQ4_XS] = _ENDS[Type.IQ4_NL]

_TOPS = {Type.Q5_1: 31, Type.Q5_K: 31, Type.Q4_1: 15, Type.Q4_K: 15, Type.Q2_K: 3}
_CLIPS = {31: clips(-3, 3, 24), 15: clips(-2, 3, 24), 3: clips(0, 3, 24)}

_FLOAT_CODES = (15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7)
_FLOAT_BIAS = 128  # the exponent of the scale in a file minus the exponent of the scale


def type_name(kind: Type) -> str:
    """The name of a type in llama.cpp, such as ``q4_K``."""
    return kind.name.lower().replace("_k", "_K")


@dataclass(frozen=True, kw_only=True)
class BlockPoints(Points):
    """Points whose scales and offsets are integers times a unit for each super-block.

    Attributes:
        units: the units of scales (out, super-blocks), numbers of fp16.
        factors: the integers of scales (out, groups).
        minimum_units: the units of offsets (out, super-blocks); None for no offsets.
        minimum_factors: the integers of offsets (out, groups); None for no offsets.
    """

    units: Tensor
    factors: Tensor
    minimum_units: Tensor | None = None
    minimum_factors: Tensor | None = None


@dataclass(frozen=True)
class BlockGrid(Grid):
    """A type of GGUF with blocks of columns.

    Args:
        type: the type.
    """

    type: Type

    @property
    def name(self) -> str:
        """The name in llama.cpp, such as ``q4_K``."""
        return type_name(self.type)

    @property
    def block(self) -> int:
        """The number of columns of a block; a row has whole blocks."""
        return gguf.GGML_QUANT_SIZES[self.type][0]

    def row_bytes(self, columns: int) -> int:
        """The number of bytes of a row."""
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return columns // block * size

    def encoded(self, points: Points, indices: Tensor) -> Tensor:
        """See `Grid.encoded`; the bytes are blocks as in llama.cpp."""
        rows = indices.shape[0]
        blocks = indices.to(torch.uint8).view(rows, -1, self.block)
        return torch.cat(self._parts(points, blocks), 2).view(rows, -1)

    @abstractmethod
    def _parts(self, points: Points, indices: Tensor) -> list[Tensor]:
        """The parts of blocks (out, blocks, bytes) for indices (out, blocks, columns)."""


@dataclass(frozen=True)
class ScaledGrid(BlockGrid):
    """Integers or numbers of a table with a scale in fp16: ``q8_0``, ``q5_0``, ``q4_0``."""

    def points(self, weight: Tensor, importance: Tensor, dtype: torch.dtype) -> Points:
        """See `Grid.points`; points are numbers of fp32."""
        levels, ends = _LEVELS[self.type], _ENDS[self.type]

        def search(weights: Weights) -> list[Tensor]:
            return [half_scales(weights, levels, ends)]

        (scales,) = searched(weight, importance, self.block, self.block, search)
        return Points(levels.tensor(weight.device), scales, self.block)

    def _parts(self, points: Points, indices: Tensor) -> list[Tensor]:
        scales = half_bytes(points.scales)
        if self.type is Type.Q8_0:
            return [scales, indices - 127]  # modulo 256, as int8 has it
        if self.type is Type.Q5_0:
            return [scales, shared_bytes(indices >> 4, 1, 1), shared_bytes(indices & 15, 4, 16)]
        return [scales, shared_bytes(indices, 4, 16)]


@dataclass(frozen=True)
class TableGrid(ScaledGrid):
    """Numbers of a table without 0, with a scale in fp16: ``iq4_nl``."""

    holds_zero: ClassVar[bool] = False


@dataclass(frozen=True)
class FloatGrid(BlockGrid):
    """Floats of 4 bits with a power of two as the scale: ``mxfp4``."""

    def points(self, weight: Tensor, importance: Tensor, dtype: torch.dtype) -> Points:
        """See `Grid.points`; points are numbers of fp32."""
        levels = _LEVELS[self.type]

        def search(weights: Weights) -> list[Tensor]:
            first = torch.frexp(weights.extremes).exponent - 4  # 12 lies between 2**3 and 2**4
            best = [torch.full_like(weights.extremes, math.inf), weights.extremes]
            for change in (0, 1, -1):
                scales = torch.exp2((first + change).clamp(-126, 126).float())
                error = weights.error(levels, scales)
                best = where(error < best[0], (error, scales), best)
            return best[1:]

        (scales,) = searched(weight, importance, self.block, self.block, search)
        return Points(levels.tensor(weight.device), scales, self.block)

    def _parts(self, points: Points, indices: Tensor) -> list[Tensor]:
        exponents = torch.frexp(points.scales).exponent - 1 + _FLOAT_BIAS
        codes = torch.tensor(_FLOAT_CODES, dtype=torch.uint8, device=indices.device)
        fields = codes[indices.long()]
        return [exponents.to(torch.uint8).unsqueeze(2), shared_bytes(fields, 4, 16)]


@dataclass(frozen=True)
class OffsetGrid(BlockGrid):
    """Integers from 0 with a scale and an offset in fp16: ``q5_1``, ``q4_1``."""

    holds_zero: ClassVar[bool] = False

    def points(self, weight: Tensor, importance: Tensor, dtype: torch.dtype) -> Points:
        """See `Grid.points`; points are numbers of fp32."""
        top = _TOPS[self.type]

        def search(weights: Weights) -> Sequence[Tensor]:
            return half_pairs(weights, top, _CLIPS[top])

        scales, offsets = searched(weight, importance, self.block, self.block, search)
        return Points(Levels.between(0, top).tensor(weight.device), scales, self.block, offsets)

    def _parts(self, points: Points, indices: Tensor) -> list[Tensor]:
        assert points.offsets is not None
        numbers = [half_bytes(points.scales), half_bytes(-points.offsets)]
        if self.type is Type.Q5_1:
            numbers.append(shared_bytes(indices >> 4, 1, 1))
        return [*numbers, shared_bytes(indices & 15, 4, 16)]


@dataclass(frozen=True)
class SuperBlockGrid(BlockGrid):
    """A type with super-blocks: scales of groups are integers times a unit."""

    @property
    def group(self) -> int:
        """The number of columns that share a scale."""
        return 16 if self.type in (Type.Q6_K, Type.Q3_K, Type.Q2_K) else 32

    def _blocks(self, weights: Weights) -> int:
        return weights.values.shape[1] * self.group // self.block

    def _spread(self, units: Tensor) -> Tensor:
        """Units (out, super-blocks) for each group (out, groups)."""
        return units.repeat_interleave(self.block // self.group, 1)

    def _bytes(self, integers: Tensor) -> Tensor:
        """Integers of groups (out, groups) as (out, super-blocks, groups) in uint8."""
        return integers.to(torch.uint8).view(len(integers), -1, self.block // self.group)


@dataclass(frozen=True)
class SuperScaledGrid(SuperBlockGrid):
    """Signed integers with integer scales in super-blocks: ``q6_K``, ``q3_K``."""

    def points(self, weight: Tensor, importance: Tensor, dtype: torch.dtype) -> Points:
        """See `Grid.points`; points are numbers of fp32."""
        levels, ends = _LEVELS[self.type], _ENDS[self.type]
        most = 128 if self.type is Type.Q6_K else 32
        integers = Integers(-most, most - 1, zero=0 not in levels.values)
        changes = (most // 16, 2)

        def search(weights: Weights) -> list[Tensor]:
            blocks = self._blocks(weights)
            (found,) = shared_scales(weights, levels, integers, blocks, ends, changes)
            return [found.unit, found.integers]

        units, factors = searched(weight, importance, self.group, self.block, search)
        return BlockPoints(
            levels.tensor(weight.device),
            self._spread(units) * factors,
            self.group,
            units=units,
            factors=factors,
        )

    def _parts(self, points: Points, indices: Tensor) -> list[Tensor]:
        assert isinstance(points, BlockPoints)
        units = half_bytes(points.units)
        if self.type is Type.Q6_K:
            low, high = shared_bytes(indices & 15, 4, 64), shared_bytes(indices >> 4, 2, 32)
            return [low, high, self._bytes(points.factors.to(torch.int8)), units]
        factors = self._bytes(points.factors + 32)
        scales = [shared_bytes(factors & 15, 4, 8), shared_bytes(factors >> 4, 2, 4)]
        low, high = shared_bytes(indices & 3, 2, 32), shared_bytes(indices >> 2, 1, 32)
        return [high, low, *scales, units]


@dataclass(frozen=True)
class SuperTableGrid(SuperScaledGrid):
    """Numbers of a table with integer scales in super-blocks: ``iq4_xs``."""

    holds_zero: ClassVar[bool] = False

    def _parts(self, points: Points, indices: Tensor) -> list[Tensor]:
        assert isinstance(points, BlockPoints)
        factors = self._bytes(points.factors + 32)
        scales = [shared_bytes(factors >> 4, 2, 1), shared_bytes(factors & 15, 4, 1)]
        return [half_bytes(points.units), *scales, shared_bytes(indices, 4, 16)]


@dataclass(frozen=True)
class SuperOffsetGrid(SuperBlockGrid):
    """Integers from 0 with integer scales and offsets in super-blocks.

    They are ``q5_K``, ``q4_K`` and ``q2_K``.
    """

    holds_zero: ClassVar[bool] = False

    def points(self, weight: Tensor, importance: Tensor, dtype: torch.dtype) -> Points:
        """See `Grid.points`; points are numbers of fp32."""
        top, most = _TOPS[self.type], 15 if self.type is Type.Q2_K else 63

        def search(weights: Weights) -> list[Tensor]:
            blocks = self._blocks(weights)
            found = shared_pairs(weights, top, most, blocks, _CLIPS[top], (2, 1))
            return [part for shared in found for part in (shared.unit, shared.integers)]

        found = searched(weight, importance, self.group, self.block, search)
        units, factors, minimum_units, minimum_factors = found
        return BlockPoints(
            Levels.between(0, top).tensor(weight.device),
            self._spread(units) * factors,
            self.group,
            self._spread(minimum_units) * minimum_factors,
            units=units,
            factors=factors,
            minimum_units=minimum_units,
            minimum_factors=minimum_factors,
        )

    def _parts(self, points: Points, indices: Tensor) -> list[Tensor]:
        assert isinstance(points, BlockPoints)
        assert points.minimum_units is not None
        assert points.minimum_factors is not None
        units = [half_bytes(points.units), half_bytes(points.minimum_units)]
        scales, minima = self._bytes(points.factors), self._bytes(points.minimum_factors)
        if self.type is Type.Q2_K:
            return [scales | (minima << 4), shared_bytes(indices, 2, 32), *units]
        parts = [*units, six_bit_pairs(scales, minima)]
        if self.type is Type.Q5_K:
            parts.append(shared_bytes(indices >> 4, 1, 32))
        return [*parts, shared_bytes(indices & 15, 4, 32)]


GRIDS: tuple[BlockGrid, ...] = (
    ScaledGrid(Type.Q8_0),
    SuperScaledGrid(Type.Q6_K),
    OffsetGrid(Type.Q5_1),
    SuperOffsetGrid(Type.Q5_K),
    ScaledGrid(Type.Q5_0),
    OffsetGrid(Type.Q4_1),
    SuperOffsetGrid(Type.Q4_K),
    ScaledGrid(Type.Q4_0),
    TableGrid(Type.IQ4_NL),
    FloatGrid(Type.MXFP4),
    SuperTableGrid(Type.IQ4_XS),
    SuperScaledGrid(Type.Q3_K),
    SuperOffsetGrid(Type.Q2_K),
)
"""All types, from many bits to few."""


def grids_for(columns: int) -> tuple[BlockGrid, ...]:
    """The grids that fit a matrix with this number of columns: rows have whole blocks."""
    return tuple(grid for grid in GRIDS if columns % grid.block == 0)


def encode(values: Tensor, grid: BlockGrid, importance: Tensor | None = None) -> Tensor:
    """The bytes (out, bytes) of a matrix (out, in): each weight has the nearest point.

    Args:
        values: the weights.
        grid: the grid.
        importance: the weight of the squared error of each column (in,); None for equal weights.
    """
    rows, columns = values.shape
    weighting = values.new_ones(columns) if importance is None else importance
    result = torch.empty(rows, grid.row_bytes(columns), dtype=torch.uint8, device=values.device)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        part = values[start : start + step].float()
        points = grid.points(part, weighting.float(), torch.float32)
        by_column = part.t().contiguous()
        indices = torch.empty_like(by_column, dtype=torch.uint8)
        for column in range(columns):
            indices[column] = points.nearest(by_column[column], column)
        result[start : start + step] = grid.encoded(points, indices.t().contiguous())
    return result
