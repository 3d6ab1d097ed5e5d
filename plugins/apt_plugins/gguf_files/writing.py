"""The tensors of a GGUF file, of which one at a time is in memory."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from apt.errors import AptError
from apt_plugins.gguf_files.own_integers import as_q4_0

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Planned:
    """A tensor to write.

    Attributes:
        name: its name in GGUF.
        shape: its shape, with the columns last, as numpy and torch have it.
        type: the type in the file.
        values: makes its values, in fp32; or its bytes as they are in another file, if ``raw``.
        raw: True to write what ``values`` makes as it is.
    """

    name: str
    shape: tuple[int, ...]
    type: Type
    values: Callable[[], Array]
    raw: bool = False

    @property
    def size(self) -> int:
        """Its bytes in the file."""
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * size


@dataclass
class Counts:
    """What was counted in the matrices of the blocks.

    Attributes:
        zeros: their zeros.
        kept: the zeros that are zero in the file.
        integers: the matrices whose own integers are in the file.
    """

    zeros: int = 0
    kept: int = 0
    integers: int = 0


def write_file(writer: gguf.GGUFWriter, tensors: Sequence[Planned], kind: Type) -> Counts:
    """Write a file, and read it back.

    Args:
        writer: the writer, with all metadata but what follows from the type.

    Raises:
        AptError: a value is too large for its type.
    """
    quantised = kind not in (Type.F32, Type.F16, Type.BF16)
    version = gguf.Keys.General.QUANTIZATION_VERSION
    if quantised and not any(version in entries for entries in writer.kv_data):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for planned in tensors:
        writer.add_tensor_info(
            planned.name, planned.shape, np.dtype(np.float32), planned.size, planned.type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    counts, hashes = Counts(), []
    for planned in tensors:
        data = _data(planned, counts)
        hashes.append(_hash(data))
        writer.write_tensor_data(data)
    path = writer.path
    writer.close()
    for tensor, planned, known in zip(
        gguf.GGUFReader(str(path)).tensors, tensors, hashes, strict=True
    ):
        if tensor.name != planned.name or _hash(tensor.data) != known:
            raise RuntimeError(f"{planned.name} was not written as it is")
    return counts


def _data(planned: Planned, counts: Counts) -> Array:
    """What is written of a tensor. The zeros of a matrix of a block are counted."""
    values = np.ascontiguousarray(planned.values())
    if planned.raw:
        return values
    own = as_q4_0(values) if planned.type is Type.Q4_0 else None
    counts.integers += own is not None
    with np.errstate(over="ignore"):
        data = gguf.quantize(values, planned.type) if own is None else own
    if planned.type is Type.F16 and not np.isfinite(data).all():
        fault = f"{planned.name} has values beyond 65,504, the largest of f16"
        raise AptError(fault, "write bf16 or f32", ("type",))
    if planned.name.startswith("blk.") and len(planned.shape) > 1:
        zero = values == 0
        counts.zeros += int(zero.sum())
        counts.kept += int((gguf.dequantize(data, planned.type)[zero] == 0).sum())
    return data


def _hash(data: Array) -> bytes:
    return blake2b(np.ascontiguousarray(data).view(np.uint8).data, digest_size=16).digest()
