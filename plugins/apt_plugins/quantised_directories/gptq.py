"""GPTQ: integers packed along the inputs of a matrix that is (in, out), in groups of inputs.

The first version of the format stores each zero point minus 1.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, arange

from apt.checkpoints.safetensors_io import Entry
from apt.extending import ExpandedTensor
from apt_plugins.quantised_directories.arithmetic import unpacked
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

_BITS = (2, 3, 4, 8)


class Gptq(Format):
    """``quant_method`` gptq."""

    title = "GPTQ"
    marker = "qweight"
    endings: ClassVar = {
        "integers": "qweight",
        "zeros": "qzeros",
        "scales": "scales",
        "order": "g_idx",
    }
    needed = ("zeros", "scales")

    @classmethod
    def description(cls, record: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The ``quantization_config`` of method gptq."""
        quantization = quantization_of(record, "gptq")
        if quantization is None:
            return None
        kind = quantization.get("checkpoint_format", quantization.get("format")) or "gptq"
        if kind not in ("gptq", "gptq_v2") or quantization.get("bits") not in _BITS:
            raise unsupported(f"GPTQ with the format {kind} and {quantization.get('bits')} bits")
        return quantization

    @property
    def _bits(self) -> int:
        return int(self.quantization["bits"])

    @property
    def _zero_point_offset(self) -> int:
        """The number to add to stored zero points."""
        kind = self.quantization.get("checkpoint_format", self.quantization.get("format"))
        return 0 if kind == "gptq_v2" else 1

    def matrix(
        self, stem: str, entries: Mapping[str, Entry]
    ) -> tuple[ExpandedTensor, dict[str, Cut]]:
        """A matrix of which no output can be cut out: the zero points of several share a word."""
        integers, zeros, scales = (entries[role] for role in ("integers", "zeros", "scales"))
        check_words(integers, zeros)
        check_floats(scales)
        words, out = integers.shape
        columns = words * 32 // self._bits
        groups = scales.shape[0]
        order = entries.get("order")
        fits = scales.shape == (groups, out) and zeros.shape == (groups, out * self._bits // 32)
        if not fits or (order is not None and order.shape != (columns,)):
            raise ValueError(
                f"{integers.shape} words with zero points {zeros.shape} and scales {scales.shape}"
            )
        if order is None and columns % groups:
            raise ValueError(f"{groups} groups of {columns} columns, and no g_idx")
        expanded = ExpandedTensor((out, columns), scales.dtype, f"int{self._bits}")
        return expanded, dict.fromkeys(entries, Cut.NEVER)

    def expand(self, stem: str, shape: tuple[int, ...], parts: Parts) -> Tensor:
        """The integers less the zero points of their groups, times the scales."""
        out, columns = shape
        values = unpacked(parts["integers"].T, self._bits, columns).float()  # (out, in)
        zeros = unpacked(parts["zeros"], self._bits, out).float() + self._zero_point_offset
        scales = parts["scales"].float()
        order = parts.get("order", arange(columns) // (columns // len(scales))).long()
        if int(order.min()) < 0 or int(order.max()) >= len(scales):
            raise damaged(f"{stem}g_idx", "it names groups that do not exist")
        return (values - zeros[order].T) * scales[order].T
