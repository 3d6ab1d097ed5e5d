"""The 4-bit numbers of bitsandbytes: NF4 and FP4, in groups scaled by their largest value.

The largest values may themselves be quantised, to bytes with a table, in groups of another size.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from apt.checkpoints.safetensors_io import Entry
from apt.extending import ExpandedTensor
from apt_plugins.quantised_directories.format import (
    Cut,
    Format,
    Parts,
    damaged,
    quantization_of,
    unsupported,
)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_STATE = "weight.quant_state.bitsandbytes__"


class BitsAndBytes(Format):
    """``quant_method`` bitsandbytes, in 4 bits."""

    title = "bitsandbytes' 4 bits"
    marker = "weight.absmax"
    endings: ClassVar = {
        "numbers": "weight", "largest": "weight.absmax", "values": "weight.quant_map",
        "nested_largest": "weight.nested_absmax", "nested_values": "weight.nested_quant_map",
        "nf4": f"{_STATE}nf4", "fp4": f"{_STATE}fp4",
    }  # fmt: skip
    needed = ("numbers", "values")

    @classmethod
    def description(cls, record: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The ``quantization_config`` of method bitsandbytes."""
        quantization = quantization_of(record, "bitsandbytes")
        if quantization is not None and not quantization.get(
            "load_in_4bit", quantization.get("_load_in_4bit")
        ):
            raise unsupported("bitsandbytes in 8 bits")
        return quantization

    def matrix(
        self, stem: str, entries: Mapping[str, Entry]
    ) -> tuple[ExpandedTensor, dict[str, Cut]]:
        """A matrix of which no row can be cut out: groups do not end with rows."""
        state = self._state(stem)
        shape, dtype = tuple(int(n) for n in state["shape"]), _DTYPES[state["dtype"]]
        count, size = math.prod(shape), int(state["blocksize"])
        groups = math.prod(entries["largest"].shape)
        if entries["numbers"].size != -(-count // 2) or groups != -(-count // size):
            raise ValueError(f"{entries['numbers'].size} bytes in {groups} groups for {shape}")
        if entries["values"].shape != (16,):
            raise ValueError(f"a table of {entries['values'].shape} values")
        if min(shape) < 1 or ("nested_largest" not in entries) != (
            entries["largest"].dtype.is_floating_point
        ):
            raise ValueError(f"{shape} numbers with {entries['largest'].dtype} for each group")
        if "nested_largest" in entries:
            nested = math.prod(entries["nested_largest"].shape)
            size, table = int(state["nested_blocksize"]), entries.get("nested_values")
            if nested != -(-groups // size) or table is None or table.shape != (256,):
                raise ValueError(f"{nested} nested groups for {groups}")
            float(state["nested_offset"])
        expanded = ExpandedTensor(shape, dtype, str(state["quant_type"]))
        return expanded, dict.fromkeys(entries, Cut.NEVER)

    def expand(self, stem: str, shape: tuple[int, ...], parts: Parts) -> Tensor:
        """The values of the table, times the largest absolute values of their groups."""
        state = self._state(stem)
        largest = parts["largest"].flatten()
        if "nested_largest" in parts:
            nested_scales = parts["nested_largest"].repeat_interleave(
                int(state["nested_blocksize"])
            )
            values = parts["nested_values"][largest.long()] * nested_scales[: len(largest)]
            largest = values + float(state["nested_offset"])
        data = parts["numbers"].flatten().view(torch.uint8)
        codes = torch.stack([data >> 4, data & 15], -1).flatten()[: math.prod(shape)]
        numbers = parts["values"][codes.int()]
        scales = largest.float().repeat_interleave(int(state["blocksize"]))[: len(numbers)]
        return (numbers * scales).reshape(shape)

    def _state(self, stem: str) -> Mapping[str, Any]:
        """The description of a matrix, which is stored as text beside it."""
        kinds = (f"{stem}{_STATE}{kind}" for kind in ("nf4", "fp4"))
        key = next((key for key in kinds if key in self.shards), "")
        if not key:
            raise ValueError(f"{stem}{_STATE}nf4 is missing")
        try:
            state = json.loads(self.shards.read(key).numpy().tobytes())
        except (ValueError, RecursionError) as error:
            raise damaged(key, "it is not JSON") from error
        if not isinstance(state, dict):
            raise damaged(key, "it is not a mapping")
        return state
