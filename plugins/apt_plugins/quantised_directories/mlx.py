"""MLX: groups of a row with a scale and a bias, and experts in stacks (``switch_mlp``).

The layouts are those that mlx-lm writes. MLX itself is not needed.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from apt.checkpoints.safetensors_io import Entry
from apt.errors import AptError
from apt.extending import ExpandedTensor
from apt_plugins.quantised_directories.arithmetic import as_scales, fp4, grouped, packed, unpacked
from apt_plugins.quantised_directories.format import Cut, Format, Parts, check_floats, unsupported

_DENSE = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "phi3",
    "starcoder2", "cohere", "cohere2", "smollm3", "granite", "ernie4_5",
)  # fmt: skip
_MIXTURES = (
    "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe", "dots1",
    "ernie4_5_moe",
)  # fmt: skip
_NUMBERED = ("mixtral", "phimoe")  # their matrices are named w1, w2 and w3
_NUMBERS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_STACK = re.compile(r"\.switch_mlp\.(gate_proj|up_proj|down_proj)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.")


class Mlx(Format):
    """``quantization`` with ``group_size`` and ``bits`` in ``config.json``."""

    title = "MLX"
    marker = ".scales"
    endings: ClassVar = {"numbers": ".weight", "scales": ".scales", "biases": ".biases"}
    needed = ("numbers",)
    expanded_ending = ".weight"

    @classmethod
    def description(cls, record: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The ``quantization``, if mlx-lm only renames and stacks the tensors of the family."""
        quantization = record.get("quantization")
        if not isinstance(quantization, dict) or not {"group_size", "bits"} <= quantization.keys():
            return None
        kind = record.get("model_type")
        if kind not in (*_DENSE, *_MIXTURES, *_NUMBERED):
            raise unsupported(f"MLX with models of type '{kind}'")
        modes = {each.get("mode", "affine") for each in (quantization, *quantization.values())
                 if isinstance(each, dict)}  # fmt: skip
        if other := modes - {"affine", "mxfp4"}:
            raise unsupported(f"MLX in the mode {min(map(str, other))}")
        return quantization

    def _grouping(self, stem: str) -> tuple[int, int, str]:
        """The size of groups, the bits and the mode of a module, which may have its own."""
        own = self.quantization.get(stem)
        quantization = {**self.quantization, **own} if isinstance(own, dict) else self.quantization
        return (
            int(quantization["group_size"]),
            int(quantization["bits"]),
            str(quantization.get("mode", "affine")),
        )

    @cached_property
    def _stacked(self) -> bool:
        """True if experts are in stacks; some families have them one by one."""
        return any(_STACK.search(key) for key in self.shards.entries)

    def matrix(
        self, stem: str, entries: Mapping[str, Entry]
    ) -> tuple[ExpandedTensor, dict[str, Cut]]:
        """A matrix, or a stack of experts."""
        group, bits, mode = self._grouping(stem)
        numbers, scales = entries["numbers"], entries["scales"]
        columns = scales.shape[-1] * group
        affine = mode == "affine"
        if affine:
            check_floats(scales, *([entries["biases"]] if "biases" in entries else []))
        fits = numbers.shape == (*scales.shape[:-1], columns * bits // 32)
        if not fits or numbers.dtype != torch.uint32 or not 2 <= bits <= 8:
            raise ValueError(
                f"{bits} bits in groups of {group}: {numbers.shape} words, scales {scales.shape}"
            )
        if not affine and scales.dtype != torch.uint8:
            raise ValueError(f"its scales are {scales.dtype}, not bytes")
        if affine and ("biases" not in entries or entries["biases"].shape != scales.shape):
            raise ValueError(f"{stem}.biases is missing, or has another shape than the scales")
        shape = (*scales.shape[:-1], columns)
        expanded = ExpandedTensor(
            shape, scales.dtype if affine else self.dtype, f"int{bits}" if affine else mode
        )
        return expanded, dict.fromkeys(entries, Cut.ROWS)

    def expand(self, stem: str, shape: tuple[int, ...], parts: Parts) -> Tensor:
        """The integers times the scales of their groups, plus the biases."""
        group, bits, mode = self._grouping(stem)
        if mode == "mxfp4":
            numbers = fp4(parts["numbers"].view(torch.uint8), torch.float32)
            return (grouped(numbers, group) * as_scales(parts["scales"]).unsqueeze(-1)).flatten(-2)
        groups = grouped(unpacked(parts["numbers"], bits, shape[-1]), group)
        scales, biases = (parts[role].float().unsqueeze(-1) for role in ("scales", "biases"))
        return groups.float().mul(scales).add(biases).flatten(-2)

    def can_round(self, stem: str, roles: Iterable[str]) -> bool:
        """True for integers with scales and biases."""
        return self._grouping(stem)[2] == "affine"

    def rounded(self, stem: str, values: Tensor, stored: Parts) -> dict[str, Tensor]:
        """Integers, scales and biases by the rule of MLX: the value farthest from 0 is exact."""
        group, bits, _ = self._grouping(stem)
        groups, largest = grouped(values, group), 2**bits - 1
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        from_low = low.abs() > high.abs()
        scales = ((high - low) / largest).clamp(min=1e-7)
        scales = torch.where(from_low, scales, -scales)
        edge = torch.where(from_low, low, high)
        steps = (edge / scales).round()
        scales = torch.where(steps != 0, edge / steps, scales)
        biases = torch.where(steps != 0, edge, torch.zeros_like(edge))
        integers = ((groups - biases) / scales).round().clamp(0, largest).flatten(-2)
        dtype = stored["scales"].dtype
        return {
            "numbers": packed(integers.to(torch.uint8), bits, torch.uint32),
            "scales": scales.squeeze(-1).to(dtype), "biases": biases.squeeze(-1).to(dtype),
        }  # fmt: skip

    def names(self, key: str, count: int) -> list[tuple[str, int | None]]:
        """The experts of a stack, one by one; other tensors have the names of transformers."""
        stack = _STACK.search(key)
        if stack is None:
            if self._stacked and _EXPERT.search(key):
                raise AptError(f"{key} is not in a stack, as other experts are", "convert it again")
            return [(key, None)]
        matrix = stack[1]
        if self.record["model_type"] in _NUMBERED:
            matrix = _NUMBERS[matrix]
        return [(_STACK.sub(f".experts.{place}.{matrix}.", key), place) for place in range(count)]

    def location(self, name: str) -> tuple[str, int | None]:
        """The stack of an expert's matrix, and its place there."""
        expert = _EXPERT.search(name)
        if expert is None or not self._stacked:
            return name, None
        matrices = {number: matrix for matrix, number in _NUMBERS.items()}
        matrix = matrices.get(expert[2], expert[2])
        return _EXPERT.sub(f".switch_mlp.{matrix}.", name), int(expert[1])
