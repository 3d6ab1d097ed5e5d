"""MXFP4, the format of gpt-oss: stacks of experts in FP4, with a power of two for each 32 numbers.

Stored stacks are (experts, out, groups, 16 bytes); the parameters are (experts, in, out).
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from apt.checkpoints.safetensors_io import Entry
from apt.extending import ExpandedTensor
from apt_plugins.quantised_directories.arithmetic import as_mxfp4, as_scales, fp4, grouped
from apt_plugins.quantised_directories.format import Cut, Format, Parts, quantization_of

_GROUP = 32  # numbers with one scale
_GROUP_BYTES = 16


class Mxfp4(Format):
    """``quant_method`` mxfp4."""

    title = "MXFP4"
    marker = "_blocks"
    endings: ClassVar = {"blocks": "_blocks", "scales": "_scales"}
    needed = ("scales",)
    expanded_ending = ""

    @classmethod
    def description(cls, record: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The ``quantization_config`` of method mxfp4."""
        return quantization_of(record, "mxfp4")

    def matrix(
        self, stem: str, entries: Mapping[str, Entry]
    ) -> tuple[ExpandedTensor, dict[str, Cut]]:
        """A stack of experts."""
        blocks, scales = entries["blocks"], entries["scales"]
        if len(blocks.shape) != 4 or blocks.shape != (*scales.shape, _GROUP_BYTES):
            raise ValueError(f"blocks of shape {blocks.shape} with scales of {scales.shape}")
        if {blocks.dtype, scales.dtype} != {torch.uint8}:
            raise ValueError(f"blocks are {blocks.dtype} and scales {scales.dtype}, not bytes")
        experts, out, groups = scales.shape
        expanded = ExpandedTensor((experts, groups * _GROUP, out), self.dtype, "mxfp4")
        return expanded, {"blocks": Cut.ROWS, "scales": Cut.ROWS}

    def expand(self, stem: str, shape: tuple[int, ...], parts: Parts) -> Tensor:
        """The numbers times the powers of two, expert by expert."""
        stack = torch.empty(shape, dtype=self.dtype)
        for place, (blocks, scales) in enumerate(
            zip(parts["blocks"], parts["scales"], strict=True)
        ):
            numbers = fp4(blocks, self.dtype)  # (out, groups, 32)
            powers = as_scales(scales).unsqueeze(-1).to(self.dtype)
            stack[place] = (numbers * powers).flatten(1).T
        return stack

    def can_round(self, stem: str, roles: Iterable[str]) -> bool:
        """True for all stacks."""
        return True

    def rounded(self, stem: str, values: Tensor, stored: Parts) -> dict[str, Tensor]:
        """The nearest numbers, by the rule of the MX formats."""
        pairs = [as_mxfp4(grouped(expert.T, _GROUP)) for expert in values]
        blocks, scales = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        return {"blocks": blocks, "scales": scales}
