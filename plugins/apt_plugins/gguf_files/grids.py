"""The types of GGUF as grids: blocks of columns with a scale, as llama.cpp decodes them.

A point is computed in fp32 as llama.cpp computes it, so that a file decodes to the points exactly.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from apt.patterns import Grid, Points
from apt_plugins.gguf_files.bit_fields import half_bytes, shared_bytes, six_bit_pairs
from apt_plugins.gguf_files.scale_search import (
    Integers,
    Levels,
    Shared,
    Weights,
    half_pairs,
    half_scales,
    searched,
    shared_pairs,
    shared_scales,
)

_ROWS = 2**20  # weights that are encoded at a time


def _steps(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(torch.linspace(first, last, count).tolist())


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
        return self.type.name.lower().replace("_k", "_K")

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
    """Signed integers with a scale in fp16: ``q8_0``, ``q5_0``, ``q4_0``."""

    _LEVELS: ClassVar = {
        Type.Q8_0: Levels(tuple(range(-127, 128))),
        Type.Q5_0: Levels(tuple(range(-16, 16))),
        Type.Q4_0: Levels(tuple(range(-8, 8))),
    }
    _ENDS: ClassVar = {
        Type.Q8_0: _steps(126.5, 129, 11),
        Type.Q5_0: (*_steps(-18.5, -15, 15), *_steps(14, 17.5, 15)),
        Type.Q4_0: (*_steps(-10.2, -7, 17), *_steps(6.2, 9, 15)),
    }

    @property
    def levels(self) -> Levels:
        """The levels."""
        return self._LEVELS[self.type]

    def points(self, weight: Tensor, importance: Tensor, dtype: torch.dtype) -> Points:
        """See `Grid.points`; points are numbers of fp32."""
        levels = self.levels

        def search(weights: Weights) -> tuple[Tensor, ...]:
            return (half_scales(weights, levels, self._ENDS[self.type], (levels.first,)),)

        (scales,) = searched(weight, importance, self.block, self.block, search)
        return Points(levels.tensor(weight), scales, self.block)

    def _parts(self, points: Points, indices: Tensor) -> list[Tensor]:
        scales = half_bytes(points.scales)
        if self.type is Type.Q8_0:
            return [scales, indices - 127]  # as int8: uint8 wraps
        if self.type is Type.Q4_0:
            return [scales, shared_bytes(indices, 4, 16)]
        return [scales, shared_bytes(indices >> 4, 1, 1), shared_bytes(indices & 15, 4, 16)]


@dataclass(frozen=True)
class OffsetGrid(BlockGrid):
    """Integers from 0 with a scale and an offset in fp16: ``q5_1``, ``q4_1``."""

    holds_zero: ClassVar[bool] = False

    @property
    def _top(self) -> int:
        return 31 if self.type is Type.Q5_1 else 15

    def points(self, weight: Tensor, importance: Tensor, dtype: torch.dtype) -> Points:
        """See `Grid.points`; points are numbers of fp32."""

        def search(weights: Weights) -> tuple[Tensor, ...]:
            return half_pairs(weights, self._top, _steps(-0.9, 2, 20))

        scales, offsets = searched(weight, importance, self.block, self.block, search)
        levels = Levels(tuple(range(self._top + 1)))
        return Points(levels.tensor(weight), scales, self.block, offsets)

    def _parts(self, points: Points, indices: Tensor) -> list[Tensor]:
        assert points.offsets is not None
        high = [] if self._top == 15 else [shared_bytes(indices >> 4, 1, 1)]
        numbers = [half_bytes(points.scales), half_bytes(-points.offsets)]
        return [*numbers, *high, shared_bytes(indices & 15, 4, 16)]


_TABLE = Levels((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))
_TABLE_ENDS = (*_steps(-145, -108, 16), *_steps(96, 129, 14))


@dataclass(frozen=True)
class TableGrid(BlockGrid):
    """Sixteen numbers of a table with a scale in fp16: ``iq4_nl``."""

    holds_zero: ClassVar[bool] = False

    def points(self, weight: Tensor, importance: Tensor, dtype: torch.dtype) -> Points:
        """See `Grid.points`; points are numbers of fp32."""

        def search(weights: Weights) -> tuple[Tensor, ...]:
            return (half_scales(weights, _TABLE, _TABLE_ENDS),)

        (scales,) = searched(weight, importance, self.block, self.block, search)
        return Points(_TABLE.tensor(weight), scales, self.block)

    def _parts(self, points: Points, indices: Tensor) -> list[Tensor]:
        return [half_bytes(points.scales), shared_bytes(indices, 4, 16)]


_FLOATS = Levels((-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12))
_FLOAT_CODES = (15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7)
_BIAS = 128  # the scale of exponent e is 2 ** (e - 128): levels are twice the numbers


@dataclass(frozen=True)
class FloatGrid(BlockGrid):
    """Floats of 4 bits with a power of two as the scale: ``mxfp4``."""

    def points(self, weight: Tensor, importance: Tensor, dtype: torch.dtype) -> Points:
        """See `Grid.points`; points are numbers of fp32."""
        (scales,) = searched(weight, importance, self.block, self.block, self._search)
        return Points(_FLOATS.tensor(weight), scales, self.block)

    @staticmethod
    def _search(weights: Weights) -> tuple[Tensor, ...]:
        largest = weights.values.abs().amax(0)
        exponents = torch.frexp(largest).exponent - 4  # the largest level is 12
        best = error = None
        for change in (0, 1, -1):
            scales = torch.ldexp(torch.ones_like(largest), (exponents + change).clamp(-126, 126))
            new = weights.error(scales, _FLOATS)
            best = scales if best is None else torch.where(new < error, scales, best)
            error = new if error is None else torch.minimum(new, error)
        assert best is not None
        return (best,)

    def _parts(self, points: Points, indices: Tensor) -> list[Tensor]:
        codes = torch.tensor(_FLOAT_CODES, dtype=torch.uint8, device=indices.device)
        exponents = torch.frexp(points.scales).exponent - 1 + _BIAS
        fields = codes[indices.long()]
        return [exponents.to(torch.uint8).unsqueeze(2), shared_bytes(fields, 4, 16)]


@dataclass(frozen=True)
class SuperScaledGrid(BlockGrid):
    """Signed integers with integer scales in super-blocks: ``q6_K``, ``q3_K``."""

    group: ClassVar[int] = 16

    @property
    def levels(self) -> Levels:
        """The levels."""
        return Levels(tuple(range(-32, 32) if self.type is Type.Q6_K else range(-4, 4)))

    @property
    def _integers(self) -> Integers:
        if self.type is Type.Q6_K:
            return Integers(-128, 127, zero=False)
        return Integers(-32, 31, zero=not self.holds_zero)

    @property
    def _ends(self) -> tuple[float, ...]:
        if self.type is Type.Q6_K:
            return (*_steps(-34, -31, 16), *_steps(30.5, 33, 10))
        return (*_steps(-6, -3, 16), *_steps(2.2, 5, 14))

    def points(self, weight: Tensor, importance: Tensor, dtype: torch.dtype) -> Points:
        """See `Grid.points`; points are numbers of fp32."""
        integers = self._integers
        unit_ends = (*_steps(integers.first - 3, integers.first + 3, 7), integers.last)

        def search(weights: Weights) -> tuple[Tensor, ...]:
            blocks = weights.values.shape[1] * self.group // self.block
            result = shared_scales(weights, self.levels, integers, blocks, self._ends, unit_ends)
            return result.unit, result.integers

        units, factors = searched(weight, importance, self.group, self.block, search)
        scales = units.repeat_interleave(self.block // self.group, 1) * factors
        return BlockPoints(
            self.levels.tensor(weight), scales, self.group, units=units, factors=factors
        )

    def _parts(self, points: Points, indices: Tensor) -> list[Tensor]:
        assert isinstance(points, BlockPoints)
        units = half_bytes(points.units)
        factors = points.factors.view(*indices.shape[:2], -1)
        if self.type is Type.Q6_K:
            scales = factors.to(torch.int8).view(torch.uint8)
            low, high = shared_bytes(indices & 15, 4, 64), shared_bytes(indices >> 4, 2, 32)
            return [low, high, scales, units]
        positive = (factors + 32).to(torch.uint8)
        scales = [shared_bytes(positive & 15, 4, 8), shared_bytes(positive >> 4, 2, 4)]
        low, high = shared_bytes(indices & 3, 2, 32), shared_bytes(indices >> 2, 1, 32)
        return [high, low, *scales, units]


@dataclass(frozen=True)
class SuperTableGrid(SuperScaledGrid):
    """Sixteen numbers of a table with integer scales in super-blocks: ``iq4_xs``."""

    holds_zero: ClassVar[bool] = False
    group: ClassVar[int] = 32

    @property
    def levels(self) -> Levels:
        """The levels."""
        return _TABLE

    @property
    def _ends(self) -> tuple[float, ...]:
        return _TABLE_ENDS

    def _parts(self, points: Points, indices: Tensor) -> list[Tensor]:
        assert isinstance(points, BlockPoints)
        positive = (points.factors + 32).to(torch.uint8).view(*indices.shape[:2], -1)
        scales = [shared_bytes(positive >> 4, 2, 1), shared_bytes(positive & 15, 4, 1)]
        return [half_bytes(points.units), *scales, shared_bytes(indices, 4, 16)]


@dataclass(frozen=True)
class SuperOffsetGrid(BlockGrid):
    """Integers from 0 with integer scales and offsets in super-blocks: ``q5_K``, ``q4_K``, ``q2_K``."""

    holds_zero: ClassVar[bool] = False

    _TOPS: ClassVar = {Type.Q5_K: 31, Type.Q4_K: 15, Type.Q2_K: 3}

    @property
    def group(self) -> int:
        """The number of columns that share a scale."""
        return 16 if self.type is Type.Q2_K else 32

    def points(self, weight: Tensor, importance: Tensor, dtype: torch.dtype) -> Points:
        """See `Grid.points`; points are numbers of fp32."""
        top, most = self._TOPS[self.type], 15 if self.type is Type.Q2_K else 63
        unit_ends = _steps(most * 0.7, most, 7)

        def search(weights: Weights) -> tuple[Tensor, ...]:
            blocks = weights.values.shape[1] * self.group // self.block
            scale, offset = shared_pairs(weights, top, most, blocks, _steps(-0.9, 2, 20), unit_ends)
            return scale.unit, scale.integers, offset.unit, offset.integers

        found = searched(weight, importance, self.group, self.block, search)
        units, factors, minimum_units, minimum_factors = found
        each = self.block // self.group
        return BlockPoints(
            Levels(tuple(range(top + 1))).tensor(weight),
            units.repeat_interleave(each, 1) * factors,
            self.group,
            minimum_units.repeat_interleave(each, 1) * minimum_factors,
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
        scales, minima = (
            factors.to(torch.uint8).view(*indices.shape[:2], -1)
            for factors in (points.factors, points.minimum_factors)
        )
        if self.type is Type.Q2_K:
            return [scales | (minima << 4), shared_bytes(indices, 2, 32), *units]
        pairs = six_bit_pairs(scales, minima)
        low = shared_bytes(indices & 15, 4, 32)
        if self.type is Type.Q4_K:
            return [*units, pairs, low]
        return [*units, pairs, shared_bytes(indices >> 4, 1, 32), low]


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
    step = max(1, _ROWS // columns)
    for start in range(0, rows, step):
        part = values[start : start + step].float()
        points = grid.points(part, weighting.float(), torch.float32)
        by_column = part.t().contiguous()
        indices = torch.empty_like(by_column, dtype=torch.uint8)
        for column in range(columns):
            indices[column] = points.nearest(by_column[column], column)
        result[start : start + step] = grid.encoded(points, indices.t().contiguous())
    return result
