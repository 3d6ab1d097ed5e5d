"""AWQ: integers of 4 bits with zero points, packed along the outputs of a matrix that is (in, out).

Each word of 32 bits has the integers of 8 outputs in the order 0, 2, 4, 6, 1, 3, 5, 7.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from apt.checkpoints.safetensors_io import Entry
from apt.extending import ExpandedTensor
from apt_plugins.quantised_directories.arithmetic import grouped, unpacked
from apt_plugins.quantised_directories.format import (
    Cut,
    Format,
    Parts,
    check_floats,
    check_words,
    quantization_of,
    unsupported,
)

_POSITIONS = (0, 4, 1, 5, 2, 6, 3, 7)  # of each output within a word
_BITS, _PER_WORD = 4, 8


class Awq(Format):
    """``quant_method`` awq, of the version gemm."""

    title = "AWQ"
    marker = "qweight"
    endings: ClassVar = {"integers": "qweight", "zeros": "qzeros", "scales": "scales"}
    needed = ("zeros", "scales")

    @classmethod
    def description(cls, record: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The ``quantization_config`` of method awq."""
        quantization = quantization_of(record, "awq")
        if quantization is None:
            return None
        version = str(quantization.get("version", quantization.get("format", "gemm"))).lower()
        if version != "gemm" or quantization.get("bits", quantization.get("w_bit", _BITS)) != _BITS:
            raise unsupported("AWQ of another version than gemm, or of other than 4 bits")
        return quantization

    def matrix(
        self, stem: str, entries: Mapping[str, Entry]
    ) -> tuple[ExpandedTensor, dict[str, Cut]]:
        """A matrix of which no output can be cut out: 8 of them share each word."""
        integers, zeros, scales = (entries[role] for role in self.endings)
        check_words(integers, zeros)
        check_floats(scales)
        rows, words = integers.shape
        groups, out = scales.shape
        if zeros.shape != (groups, words) or out != words * _PER_WORD or rows % groups:
            raise ValueError(
                f"{integers.shape} words with zero points {zeros.shape} and scales {scales.shape}"
            )
        expanded = ExpandedTensor((out, rows), scales.dtype, "int4")
        return expanded, dict.fromkeys(self.endings, Cut.NEVER)

    def expand(self, stem: str, shape: tuple[int, ...], parts: Parts) -> Tensor:
        """The integers less their zero points, times the scales."""
        values, zeros = (_in_order(parts[role], shape[0]) for role in ("integers", "zeros"))
        group = shape[1] // len(zeros)
        scales = parts["scales"].float()
        values = values - zeros.repeat_interleave(group, 0)
        return values.mul(scales.repeat_interleave(group, 0)).T


def _in_order(words: Tensor, count: int) -> Tensor:
    """Integers in the order of the outputs, fp32 (rows, count)."""
    values = grouped(unpacked(words, _BITS, count), _PER_WORD)
    return values[..., torch.tensor(_POSITIONS)].flatten(-2).float()
