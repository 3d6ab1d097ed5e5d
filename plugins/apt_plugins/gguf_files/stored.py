"""A GGUF file that is read in parts: its entries, and the bytes of its tensors.

Bytes are read, not mapped into memory: a map of a file counts as memory of the process, and files
are larger than the memory of most machines.
"""

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFReader

from apt.errors import AptError, described
from apt_plugins.gguf_files.writing import Array

_ARCHITECTURE, _TOKENS = "general.architecture", "tokenizer.ggml.tokens"
_SPECIAL_TOKENS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
_CHUNK = 1 << 26  # bytes that are read at a time


def open_reader(path: Path) -> GGUFReader:
    """The reader of the package gguf.

    Raises:
        AptError: the file is damaged, is a part of a split file, or has big-endian numbers.
    """
    try:
        reader = GGUFReader(str(path))
    except (ValueError, KeyError, IndexError, OSError, OverflowError) as error:
        message = f"{path} is not a GGUF file, or is damaged: {described(error)}"
        raise AptError(message, "get it again", ("source",)) from error
    if reader.endianess is not gguf.GGUFEndian.LITTLE or "split.count" in reader.fields:
        message = f"{path} is one of several files, or has the bytes of numbers in another order"
        raise AptError(message, "merge it, or convert it, with llama.cpp's tools", ("source",))
    return reader


class StoredFile:
    """A GGUF file.

    Attributes:
        architecture: the name of the architecture.
        tensors: the tensors of the reader, by name, in the order of the file.
        shapes: the shapes of the tensors, with the columns last, as in numpy and torch.
    """

    def __init__(self, path: Path) -> None:
        """Read the header; raises `AptError` as `open_reader` does."""
        self.path = path
        self.reader = open_reader(path)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        self.shapes = {
            name: tuple(int(n) for n in reversed(tensor.shape.tolist()))
            for name, tensor in self.tensors.items()
        }
        if _ARCHITECTURE not in self.reader.fields:
            raise AptError(f"{path} names no architecture", "is it a model?", ("source",))
        self.architecture = str(self.reader.fields[_ARCHITECTURE].contents())

    @cached_property
    def entries(self) -> Mapping[str, Any]:
        """The entries of the architecture, by their keys without its name."""
        prefix = f"{self.architecture}."
        return {
            key.removeprefix(prefix): _shortest(field.contents())
            for key, field in self.reader.fields.items()
            if key.startswith(prefix)
        }

    @property
    def special_tokens(self) -> dict[str, int]:
        """The numbers of special tokens, by the names of transformers."""
        fields = self.reader.fields
        return {
            name: int(fields[key].contents()) for name, key in _SPECIAL_TOKENS.items()
            if key in fields
        }  # fmt: skip

    @property
    def token_count(self) -> int:
        """The number of tokens; 0 in a file without a tokenizer."""
        fields = self.reader.fields
        return len(fields[_TOKENS].data) if _TOKENS in fields else 0

    def type_of(self, name: str) -> gguf.GGMLQuantizationType:
        """The type of the numbers of a tensor."""
        return self.tensors[name].tensor_type

    def row_bytes(self, name: str) -> int:
        """The bytes of one entry of the first dimension of a tensor."""
        return int(self.tensors[name].n_bytes) // self.shapes[name][0]

    def chunks(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """The bytes of entries of the first dimension of a tensor, in parts."""
        size = self.row_bytes(name)
        position = int(self.tensors[name].data_offset) + start * size
        end = position + (stop - start) * size
        with self.path.open("rb") as file:
            while position < end:
                data = os.pread(file.fileno(), min(_CHUNK, end - position), position)
                if not data:
                    raise AptError(f"{self.path} ends within {name}", "get it again", ("source",))
                yield data
                position += len(data)

    def read(self, name: str, start: int, stop: int) -> Array:
        """Entries of the first dimension of a tensor in fp32.

        Raises:
            AptError: the type cannot be expanded, or the values are not finite.
        """
        kind, shape = self.type_of(name), self.shapes[name]
        data = np.frombuffer(bytearray().join(self.chunks(name, start, stop)), np.uint8)
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                flat = gguf.dequantize(data.reshape(-1, self._last_bytes(name)), kind)
        except (NotImplementedError, ValueError) as error:
            message = f"{name} of {self.path} has numbers of type {kind.name}, which are not read"
            raise AptError(message, "get a file of another type", ("source",)) from error
        values: Array = flat.astype(np.float32, copy=False).reshape(stop - start, *shape[1:])
        if not np.isfinite(values).all():
            message = f"{name} of {self.path} holds values that are not finite"
            raise AptError(message, "the file is damaged; get it again", ("source",))
        return values

    def _last_bytes(self, name: str) -> int:
        """The bytes of one row of the last dimension."""
        block, size = gguf.GGML_QUANT_SIZES[self.type_of(name)]
        return self.shapes[name][-1] // block * size


def _shortest(value: Any) -> Any:
    """A number of fp32 with the fewest digits that name it: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
