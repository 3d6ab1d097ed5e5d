"""One packed matrix, or a stack of them: its bitmask and its kept values, or integers for them.

docs/packed-format.md specifies the layout to the bit. Data can come from untrusted files, so it
is checked before use.
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

MASK, VALUES, SCALES = "mask", "values", "scales"
"""The parts of a packed parameter; their tensors are named ``PARAMETER_PART``."""

_BITS, _DEFLATE = "bits", "deflate"
FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_INTEGERS = {"int8": 8, "int4": 4}
_LARGEST = 2**31  # rows, columns and groups are below, so that no kernel's numbers overflow
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)  # of a byte


@dataclass(frozen=True)
class Entry:
    """The description of a packed matrix.

    Attributes:
        shape: the shape of the matrix (out, in), or of a stack of matrices (count, out, in), which
            is packed as one matrix of all their rows.
        dtype: the dtype of the matrix: ``bfloat16``, ``float16`` or ``float32``.
        kept: the number of kept weights.
        mask: ``bits``, or ``deflate`` if the bitmask is compressed.
        values: how the kept weights are stored: the dtype, ``int8`` or ``int4``.
        stored: the number of bytes of the mask as it is stored.
        group: the number of columns that share a scale; 0 without scales.
    """

    shape: tuple[int, ...]
    dtype: str
    kept: int
    mask: str
    values: str
    stored: int
    group: int = 0

    @property
    def rows(self) -> int:
        """The number of rows, of all matrices of a stack."""
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """The number of columns."""
        return self.shape[-1]

    @property
    def mask_bytes(self) -> int:
        """The number of bytes of the plain bitmask."""
        return self.rows * math.ceil(self.columns / 8)

    @property
    def value_bytes(self) -> int:
        """The number of bytes of the kept values."""
        bits = _INTEGERS.get(self.values) or 8 * FLOATS[self.values].itemsize
        return math.ceil(self.kept * bits / 8)

    @property
    def groups(self) -> int:
        """The number of scales of a row."""
        return math.ceil(self.columns / self.group) if self.group else 0

    def record(self) -> dict[str, Any]:
        """The description as values for JSON."""
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def read(cls, record: Any) -> "Entry":
        """The description in a file.

        Raises:
            ValueError: a value is missing, unknown or out of range.
        """
        try:
            entry = cls(**{**record, "shape": tuple(record["shape"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"not the description of a matrix: {error}") from error
        numbers = (*entry.shape, entry.kept, entry.group, entry.stored)
        if len(entry.shape) not in (2, 3) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("shape, kept and group must be whole numbers")
        if max(*entry.shape, entry.rows, entry.group) >= _LARGEST:
            raise ValueError(f"shape {entry.shape} with groups of {entry.group} columns")
        known = entry.dtype in FLOATS and entry.mask in (_BITS, _DEFLATE)
        if not known or entry.values not in (entry.dtype, *_INTEGERS):
            raise ValueError(f"unknown kind: {entry.dtype}, {entry.mask}, {entry.values}")
        if bool(entry.group) != (entry.values in _INTEGERS):
            raise ValueError(f"{entry.values} with groups of {entry.group} columns")
        if entry.kept > math.prod(entry.shape):
            raise ValueError(f"{entry.kept} kept weights of {entry.shape}")
        return entry


Parts = dict[str, Tensor]
"""The tensors of a packed matrix by part."""


def encode(weight: Tensor) -> tuple[Entry, Parts]:
    """A matrix (out, in) as its bitmask and its kept values.

    Decoding gives the same bytes, except that a negative zero becomes a positive one: tools that
    multiply weights by a mask leave many negative zeros.
    """
    weight = weight.detach().cpu().contiguous()
    kept = weight != 0
    coding, mask = _coded(kept)
    dtype = str(weight.dtype).removeprefix("torch.")
    entry = Entry(tuple(weight.shape), dtype, int(kept.sum()), coding, dtype, mask.numel())
    return entry, {MASK: mask, VALUES: weight[kept]}


def _coded(kept: Tensor) -> tuple[str, Tensor]:
    """The bitmask (out, in), compressed if it is smaller so: Huffman codes of its bytes."""
    plain = np.packbits(kept.numpy(), axis=1, bitorder="little").tobytes()
    coder = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    small = coder.compress(plain) + coder.flush()
    coding, data = (_DEFLATE, small) if len(small) < len(plain) else (_BITS, plain)
    return coding, torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def bitmask(entry: Entry, coded: Tensor) -> Tensor:
    """The plain bitmask (out, ⌈in / 8⌉) of bytes.

    Raises:
        ValueError: it has another length, another number of kept weights, or bits behind a row.
    """
    if coded.dtype != torch.uint8 or coded.shape != (entry.stored,):
        raise ValueError(f"the mask is {tuple(coded.shape)} of {coded.dtype}")
    data = coded.numpy().tobytes()
    if entry.mask == _DEFLATE:
        data = _inflated(data, entry.mask_bytes)
    if len(data) != entry.mask_bytes:
        raise ValueError(f"the mask has {len(data):,} bytes, not {entry.mask_bytes:,}")
    columns = entry.columns
    plain = np.frombuffer(data, np.uint8).reshape(entry.rows, math.ceil(columns / 8))
    count = int(_ONES[plain].sum(dtype=np.int64))
    if count != entry.kept:
        raise ValueError(f"the mask keeps {count:,} weights, not {entry.kept:,}")
    if columns % 8 and (plain[:, -1] >> columns % 8).any():
        raise ValueError("the mask has bits behind the last column")
    return torch.from_numpy(plain.copy())


def _inflated(data: bytes, most: int) -> bytes:
    """The decompressed mask, of at most ``most`` bytes and one more."""
    try:
        reader = zlib.decompressobj(-15)
        found = reader.decompress(data, most + 1)
    except zlib.error as error:
        raise ValueError(f"the mask cannot be decompressed: {error}") from error
    if not reader.eof or reader.unused_data:
        raise ValueError("the mask does not end where its data ends")
    return found


def kept_values(entry: Entry, parts: Mapping[str, Tensor], plain: Tensor) -> Tensor:
    """The kept weights (kept,), in the dtype of the matrix.

    Args:
        entry: the description.
        parts: the tensors.
        plain: the plain bitmask.

    Raises:
        ValueError: a tensor has another size or dtype.
    """
    check_sizes(entry, parts)
    values = parts[VALUES]
    if entry.values == entry.dtype:
        return values
    whole = values.to(torch.int32) if entry.values == "int8" else _nibbles(values, entry.kept)
    rows, columns = places(entry, plain)
    scales = parts[SCALES][rows, columns // entry.group]
    return (whole.float() * scales.float()).to(FLOATS[entry.dtype])


def check_sizes(entry: Entry, parts: Mapping[str, Tensor]) -> None:
    """Raise if the values or the scales of a matrix have another size or dtype.

    Raises:
        ValueError: they do.
    """
    stored = {"int8": torch.int8, "int4": torch.uint8}.get(entry.values) or FLOATS[entry.values]
    count = math.ceil(entry.kept / 2) if entry.values == "int4" else entry.kept
    values, scales = parts[VALUES], parts.get(SCALES)
    if values.dtype != stored or values.shape != (count,):
        raise ValueError(f"the values are {tuple(values.shape)} of {values.dtype}")
    if entry.group and (scales is None or scales.shape != (entry.rows, entry.groups)):
        raise ValueError("the scales are missing or have another shape")


def places(entry: Entry, plain: Tensor) -> tuple[Tensor, Tensor]:
    """The rows and the columns of the kept weights (kept,), in their order."""
    bits = np.unpackbits(plain.numpy(), axis=1, count=entry.columns, bitorder="little")
    rows, columns = np.nonzero(bits)
    return torch.from_numpy(rows), torch.from_numpy(columns)


def _nibbles(values: Tensor, count: int) -> Tensor:
    """The integers from −8 to 7 in the halves of bytes, the lower half first."""
    halves = torch.stack([values & 15, values >> 4], 1).reshape(-1)[:count]
    return halves.to(torch.int32) - 8


def decode(entry: Entry, parts: Mapping[str, Tensor]) -> Tensor:
    """The matrix (out, in) or the stack (count, out, in).

    Raises:
        ValueError: the parts do not fit the description.
    """
    plain = bitmask(entry, parts[MASK])
    values = kept_values(entry, parts, plain)
    matrix = torch.zeros(entry.rows, entry.columns, dtype=FLOATS[entry.dtype])
    bits = np.unpackbits(plain.numpy(), axis=1, count=entry.columns, bitorder="little")
    matrix[torch.from_numpy(bits.view(bool))] = values
    return matrix.view(entry.shape)


def bound(entry: Entry) -> float:
    """The least bytes of the matrix: the entropy of its mask, its values and its scales."""
    size = math.prod(entry.shape)
    share = entry.kept / size if size else 0.0
    bits = -sum(p * math.log2(p) for p in (share, 1 - share) if p > 0)
    scales = entry.rows * entry.groups * FLOATS[entry.dtype].itemsize
    return size * bits / 8 + entry.value_bytes + scales
