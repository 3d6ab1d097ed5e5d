"""Writing of a GGUF file, with one tensor at a time in memory.

A model that was made with ``--quantize int4`` keeps its integers in the file. The quantiser of the
package gguf would round them again: its scale is the weight of the largest magnitude in a block.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from apt.errors import AptError
from apt.runtime.rounding import exact_integers
from apt_plugins.gguf_files.grids import GRIDS, encode

Array = np.ndarray[Any, Any]

BLOCK = 32
"""The columns that share a scale in ``q4_0``."""

_SCALE_ERROR = 2.0**-9  # the largest relative error of a scale in fp16: half a step of bf16


@dataclass(frozen=True)
class Planned:
    """A tensor to write.

    Attributes:
        name: the name in GGUF.
        shape: the shape, with the columns last, as in numpy and torch.
        type: the type in the file.
        values: returns the values in fp32; or, if ``raw``, the bytes to write.
        raw: True to write the result of ``values`` as it is.
        parameter: the name of the parameter in the model; None for a tensor that is not in it.
        stored: returns the bytes of the tensor in the file from which the model was made, in the
            same type; None without one. They are written again if the values are the same.
    """

    name: str
    shape: tuple[int, ...]
    type: Type
    values: Callable[[], Array]
    raw: bool = False
    parameter: str | None = None
    stored: Callable[[], Array] | None = None

    @property
    def size(self) -> int:
        """The number of bytes in the file."""
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * size


@dataclass
class Counts:
    """Counts over the matrices of the blocks.

    Attributes:
        zeros: the number of zeros.
        kept: the number of these zeros that are zero in the file.
        integers: the number of matrices whose stored integers are in the file.
        without_zero: the types of the matrices that lost zeros.
    """

    zeros: int = 0
    kept: int = 0
    integers: int = 0
    without_zero: set[Type] = field(default_factory=set)


def write_header(
    writer: gguf.GGUFWriter, tensors: Sequence[Planned], *, versioned: bool = False
) -> None:
    """Write everything before the tensors.

    Args:
        writer: the writer, with all metadata except the version of the quantisation.
        versioned: True to write this version even if no tensor is quantised, so that the size of
            the header does not depend on the types of the tensors.
    """
    version = gguf.Keys.General.QUANTIZATION_VERSION
    quantised = any(each.type not in (Type.F32, Type.F16, Type.BF16) for each in tensors)
    if (quantised or versioned) and not any(version in entries for entries in writer.kv_data):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for planned in tensors:
        writer.add_tensor_info(
            planned.name, planned.shape, np.dtype(np.float32), planned.size, planned.type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def write_file(
    writer: gguf.GGUFWriter, tensors: Sequence[Planned], *, versioned: bool = False
) -> Counts:
    """Write a file, and read it back.

    Args:
        writer, versioned: see `write_header`.

    Raises:
        AptError: a value is too large for its type.
    """
    write_header(writer, tensors, versioned=versioned)
    counts, digests = Counts(), []
    for planned in tensors:
        data = _data(planned, counts)
        digests.append(_hash(data))
        writer.write_tensor_data(data)
    path = writer.path
    writer.close()
    for tensor, planned, digest in zip(
        gguf.GGUFReader(str(path)).tensors, tensors, digests, strict=True
    ):
        if tensor.name != planned.name or _hash(tensor.data) != digest:
            raise RuntimeError(f"{planned.name} was not written as it is")
    return counts


def _data(planned: Planned, counts: Counts) -> Array:
    """The bytes to write for a tensor; the zeros of a matrix of a block are counted."""
    values = np.ascontiguousarray(planned.values())
    if planned.raw:
        return values
    data = _converted(planned, values, counts)
    if planned.type is Type.F16 and not np.isfinite(data).all():
        message = f"{planned.name} has values beyond 65,504, the largest of f16"
        raise AptError(message, "write bf16 or f32", ("type",))
    if planned.name.startswith("blk.") and len(planned.shape) > 1:
        zero = values == 0
        kept = gguf.dequantize(data, planned.type)[zero] == 0
        counts.zeros += kept.size
        counts.kept += int(kept.sum())
        if not kept.all():
            counts.without_zero.add(planned.type)
    return data


def _converted(planned: Planned, values: Array, counts: Counts) -> Array:
    """The values of a tensor in its type; exact integers and unchanged tensors keep their bytes."""
    if planned.stored is not None:
        stored = planned.stored()
        if np.array_equal(gguf.dequantize(stored, planned.type), values):
            return stored
    integers = as_q4_0(values) if planned.type is Type.Q4_0 else None
    if integers is not None:
        counts.integers += 1
        return integers
    grid = next((grid for grid in GRIDS if grid.type is planned.type), None)
    if grid is not None:
        rows = torch.from_numpy(values).flatten(0, -2)
        encoded: Array = encode(rows, grid).numpy()
        return encoded.reshape(*values.shape[:-1], -1)
    with np.errstate(over="ignore"):
        return gguf.quantize(values, planned.type)


def _hash(data: Array) -> bytes:
    return blake2b(np.ascontiguousarray(data).view(np.uint8).data, digest_size=16).digest()


def as_q4_0(values: Array) -> Array | None:
    """The bytes (…, in / 32 · 18) of a matrix (…, in) in fp32 as ``q4_0``.

    Each block has its scale in fp16, then its integers plus 8 as halves of bytes: the first 16
    integers are the lower halves.

    Returns:
        The bytes; None if the matrix does not consist of integers from −7 to 7 times a scale for
        each block, or if fp16 cannot express a scale.
    """
    narrow = _in_narrowest_dtype(torch.from_numpy(values).flatten(0, -2))
    sample = exact_integers(narrow[:8], "int4", BLOCK)  # cheap: most matrices fail on a few rows
    rounding = sample and exact_integers(narrow, "int4", BLOCK)
    if rounding is None:
        return None
    integers, scales = rounding[0], rounding[1].float()
    fp16_scales = scales.half()
    if ((fp16_scales.float() - scales).abs() > _SCALE_ERROR * scales).any():
        return None
    rows, groups = scales.shape
    levels = (integers + 8).to(torch.uint8).view(rows, groups, 2, BLOCK // 2)
    halves = levels[:, :, 0] | (levels[:, :, 1] << 4)
    packed = torch.cat([fp16_scales.view(rows, groups, 1).view(torch.uint8), halves], 2)
    return packed.view(*values.shape[:-1], -1).numpy()


def _in_narrowest_dtype(values: Tensor) -> Tensor:
    """Values in the narrowest dtype that expresses them: the dtype of the checkpoint."""
    for dtype in (torch.bfloat16, torch.float16):
        narrow = values.to(dtype)
        if torch.equal(narrow.float(), values):
            return narrow
    return values
