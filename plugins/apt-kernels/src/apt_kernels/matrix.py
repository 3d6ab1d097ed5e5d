"""A packed matrix in memory."""

import ctypes

import torch
from torch import Tensor

from apt_kernels.library import LEVEL, LEVELS, LIBRARY, Fields
from apt_kernels.memory import give_back, in_large_pages, zeros_in_large_pages

_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int8: 3, torch.uint8: 4}
_INT4 = 4
_WORD = 64  # columns
_ONES = torch.tensor([bin(byte).count("1") for byte in range(256)])  # of a byte


class Kernel:
    """A matrix (rows, columns) that multiplies vectors, with or without its zeros.

    Args:
        columns: the number of columns.
        mask: the bitmask of all rows in whole words of 64 columns, or of one row that stands for
            all of them.
        values: the kept values, row by row.
        offsets: the bytes before the values of each row (rows,).
        scales: the factors of integers (rows, groups); None for floats.
        group: the number of columns that share a scale.

    Attributes:
        fields: the matrix in the form of the library.
        level: the number of the instruction set.
    """

    def __init__(
        self,
        columns: int,
        mask: Tensor,
        values: Tensor,
        offsets: Tensor,
        scales: Tensor | None = None,
        group: int = 0,
    ) -> None:
        self.columns, self.rows = columns, len(offsets)
        words = -(-columns // _WORD)
        self._kind, self.level = _KINDS[values.dtype], LEVELS.index(LEVEL)
        self._mask, self._values, self._offsets = mask, values, offsets
        self._scales = None if scales is None else scales.float().contiguous()
        self.fields = Fields(
            self._mask.data_ptr(), 0 if _is_shared(mask) else words,
            _address(values), self._offsets.data_ptr(),
            None if self._scales is None else self._scales.data_ptr(),
            self.rows, words, group // _WORD, self._kind,
        )  # fmt: skip
        self._pointer = ctypes.pointer(self.fields)
        self._padded = words * _WORD

    def use(self, level: str) -> None:
        """Use another instruction set, which the processor must have."""
        self.level = LEVELS.index(level)

    def product(self, x: Tensor) -> Tensor:
        """``x`` (n, columns) times the transposed matrix: (n, rows) in fp32.

        Raises:
            ValueError: ``x`` has another shape, or is not on the processor.
        """
        assert LIBRARY is not None
        self._check(x)
        half = None
        if x.dtype == torch.bfloat16 and self._kind == 0:
            half = self._pad(x.contiguous())
        wide = self._pad(x.float().contiguous())
        y = torch.empty(len(x), self.rows)
        LIBRARY.apt_product(
            self._pointer, wide.data_ptr(), None if half is None else half.data_ptr(), len(x),
            y.data_ptr(), torch.get_num_threads(), self.level,
        )  # fmt: skip
        return y

    def tiled(self, x: Tensor) -> Tensor | None:
        """``x`` (n, columns) times the transposed matrix, for many vectors: (n, rows) in bf16.

        None if ``x`` is not bf16, or this instruction set has no such product.

        Raises:
            ValueError: ``x`` has another shape, or is not on the processor.
        """
        assert LIBRARY is not None
        self._check(x)
        if x.dtype != torch.bfloat16:
            return None
        padded, y = self._pad(x.contiguous()), torch.empty(len(x), self.rows, dtype=x.dtype)
        is_supported = LIBRARY.apt_tiled(
            self._pointer, padded.data_ptr(), len(x), y.data_ptr(), torch.get_num_threads(),
            self.level,
        )  # fmt: skip
        return y if is_supported else None

    def _pad(self, x: Tensor) -> Tensor:
        if self._padded == self.columns:
            return x
        return torch.nn.functional.pad(x, (0, self._padded - self.columns))

    def _check(self, x: Tensor) -> None:
        """Raise for vectors that the kernels would read beyond their end, or on another device."""
        if x.ndim != 2 or x.shape[1] != self.columns or x.device.type != "cpu":
            raise ValueError(
                f"vectors of shape {tuple(x.shape)} on {x.device} for {self.columns} columns on cpu"
            )

    def expand(self, first: int, last: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows ``first`` to ``last`` with their zeros (last − first, columns), fp32 or bf16."""
        assert LIBRARY is not None
        if not 0 <= first <= last <= self.rows or dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"rows {first} to {last} of {self.rows} in {dtype}")
        dense = torch.empty(last - first, self.columns, dtype=dtype)
        LIBRARY.apt_expand(
            self._pointer, first, last, self.columns, dense.data_ptr(),
            int(dtype == torch.bfloat16), torch.get_num_threads(), self.level,
        )  # fmt: skip
        return dense


class Matrix(Kernel):
    """A matrix without its zeros, in memory of its own.

    Args:
        columns: the number of columns.
        mask: the bitmask (rows, ⌈columns / 8⌉) of bytes: bit j of byte b is column 8 b + j, and a
            one means kept.
        values: the kept values (kept,), row by row: floats, int8, or for 4-bit integers bytes with
            two of them, the lower half first, from −8 to 7 with 8 added.
        scales: the factors of integers (rows, groups); None for floats.
        group: the number of columns that share a scale, a multiple of 64.

    Raises:
        RuntimeError: the library was not compiled.
        ValueError: the tensors do not fit together.
    """

    def __init__(
        self,
        columns: int,
        mask: Tensor,
        values: Tensor,
        scales: Tensor | None = None,
        group: int = 0,
    ) -> None:
        if LIBRARY is None:
            raise RuntimeError("apt_kernels was installed without a compiler")
        if values.dtype not in _KINDS or mask.dtype != torch.uint8:
            raise ValueError(f"values of {values.dtype} with a mask of {mask.dtype}")
        if any(t.device.type != "cpu" for t in (mask, values, scales) if t is not None):
            raise ValueError(f"values on {values.device} with a mask on {mask.device}, not on cpu")
        rows, words = mask.shape[0], -(-columns // _WORD)
        if mask.shape != (rows, -(-columns // 8)):
            raise ValueError(f"a mask of {tuple(mask.shape)} for {columns} columns")
        words_mask = _whole_words(mask, words)
        kind = _KINDS[values.dtype]
        offsets = torch.zeros(rows, dtype=torch.int64)
        size = LIBRARY.apt_offsets(words_mask.data_ptr(), rows, words, kind, offsets.data_ptr())
        if kind != _INT4 and values.nbytes != size:
            raise ValueError(f"{values.nbytes} bytes of values, and the mask keeps {size}")
        if (kind >= 3) != (scales is not None) or group % _WORD:
            raise ValueError("integers need scales, for groups of a multiple of 64 columns")
        groups = -(-columns // group) if group else 0
        if scales is not None and scales.shape != (rows, groups):
            raise ValueError(f"scales of {tuple(scales.shape)} for {groups} groups")
        if kind == _INT4:
            values = _arranged(values, words_mask, offsets, size)
        else:
            values = in_large_pages(values)
        super().__init__(columns, in_large_pages(words_mask), values, offsets, scales, group)

    @property
    def mask(self) -> Tensor:
        """The bitmask (rows, ⌈columns / 8⌉)."""
        return self._mask[:, : -(-self.columns // 8)]

    @property
    def values(self) -> Tensor:
        """The kept values, in the order of the kernels."""
        return self._values


class DenseMatrix(Kernel):
    """A dense matrix, which stays in its memory.

    Args:
        weight: the matrix (rows, columns), contiguous, on the processor, of floats. The number of
            columns is a multiple of 64.

    Raises:
        RuntimeError: the library was not compiled.
        ValueError: the kernels do not support this matrix.
    """

    def __init__(self, weight: Tensor) -> None:
        if LIBRARY is None:
            raise RuntimeError("apt_kernels was installed without a compiler")
        rows, columns = weight.shape
        served = weight.dtype in _KINDS and weight.is_floating_point() and weight.is_contiguous()
        if columns % _WORD or not served or weight.device.type != "cpu":
            raise ValueError(f"a matrix of {rows} × {columns} in {weight.dtype} on {weight.device}")
        mask = torch.full((1, columns // 8), 255, dtype=torch.uint8)
        # In words without zeros the kernels read every byte of the row, and none after its end.
        offsets = torch.arange(rows) * (columns * weight.element_size())
        super().__init__(columns, mask, weight.detach().view(-1), offsets)


def _is_shared(mask: Tensor) -> bool:
    """True if all rows have the same mask, as in a matrix without zeros."""
    return len(mask) == 1 or (len(mask) > 0 and bool((mask == mask[0]).all()))


def _address(values: Tensor) -> int:
    """The address of values in memory; torch's ``data_ptr`` is 0 for an empty tensor."""
    start = values.untyped_storage().data_ptr()
    return start + values.storage_offset() * values.element_size()


def _whole_words(mask: Tensor, words: int) -> Tensor:
    """The bitmask with rows of complete words; copied only if necessary."""
    if mask.shape[1] == 8 * words and mask.is_contiguous() and mask.data_ptr() % 8 == 0:
        return mask
    padded = torch.zeros(mask.shape[0], 8 * words, dtype=torch.uint8)
    padded[:, : mask.shape[1]] = mask
    return padded


def _arranged(values: Tensor, mask: Tensor, offsets: Tensor, size: int) -> Tensor:
    """4-bit integers in the order of the kernels. The pages of a file are given back."""
    assert LIBRARY is not None
    total = int(_ONES[mask.reshape(-1).long()].sum())
    if values.shape != (-(-total // 2),):
        raise ValueError(f"{len(values)} bytes of 4-bit values, and the mask keeps {total}")
    given, arranged = values.contiguous(), zeros_in_large_pages(size)
    LIBRARY.apt_arrange(
        mask.data_ptr(), len(mask), mask.shape[1] // 8, offsets.data_ptr(), given.data_ptr(),
        _address(arranged),
    )  # fmt: skip
    give_back(values)
    return arranged
