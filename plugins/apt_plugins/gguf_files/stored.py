"""Reading of a GGUF file in parts: its entries, and the bytes of its tensors.

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
from gguf import GGUFValueType as Kind

from apt.errors import AptError
from apt_plugins.gguf_files.header import read_header
from apt_plugins.gguf_files.writing import Array

_ARCHITECTURE, _TOKENS = "general.architecture", "tokenizer.ggml.tokens"
_SPECIAL_TOKENS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
_CHUNK = 1 << 26  # bytes that are read at a time


class StoredFile:
    """A GGUF file.

    Attributes:
        header: the entries and the positions of the tensors.
        architecture: the name of the architecture.
        shapes: the shapes of the tensors by name, with the columns last, as in numpy and torch.
    """

    def __init__(self, path: Path) -> None:
        """Read the header; raises `AptError` as `read_header` does."""
        self.path, self.header = path, read_header(path)
        self.shapes = {name: location.shape for name, location in self.header.tensors.items()}
        if _ARCHITECTURE not in self.header.entries:
            raise AptError(f"{path} names no architecture", "is it a model?")
        self.architecture = str(self.header.entries[_ARCHITECTURE].value)

    @cached_property
    def entries(self) -> Mapping[str, Any]:
        """The entries of the architecture, except lists of strings; keys lack the architecture."""
        prefix = f"{self.architecture}."
        return {
            key.removeprefix(prefix): _shortest_decimal(entry.value)
            for key, entry in self.header.entries.items()
            if key.startswith(prefix) and entry.item_kind is not Kind.STRING
        }

    @property
    def special_tokens(self) -> dict[str, int]:
        """The ids of special tokens, by the names of transformers."""
        entries = self.header.entries
        return {
            name: int(entries[key].value) for name, key in _SPECIAL_TOKENS.items() if key in entries
        }  # fmt: skip

    @property
    def token_count(self) -> int:
        """The number of tokens; 0 in a file without a tokenizer."""
        entry = self.header.entries.get(_TOKENS)
        return int(entry.value) if entry is not None and entry.item_kind is Kind.STRING else 0

    def type_of(self, name: str) -> gguf.GGMLQuantizationType:
        """The type of the numbers of a tensor."""
        return self.header.tensors[name].kind

    def row_bytes(self, name: str) -> int:
        """The bytes of one entry of the first dimension of a tensor."""
        return self.header.tensors[name].size // self.shapes[name][0]

    def chunks(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """The bytes of entries of the first dimension of a tensor, in parts."""
        size = self.row_bytes(name)
        position = self.header.tensors[name].start + start * size
        end = position + (stop - start) * size
        with self.path.open("rb") as file:
            while position < end:
                data = os.pread(file.fileno(), min(_CHUNK, end - position), position)
                if not data:
                    raise AptError(f"{self.path} ends within {name}", "get it again")
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
                flat = gguf.dequantize(data.reshape(-1, self._bytes_of_last_dimension(name)), kind)
        except (NotImplementedError, ValueError) as error:
            message = f"{name} of {self.path} has numbers of type {kind.name}, which are not read"
            raise AptError(message, "get a file of another type") from error
        values: Array = flat.astype(np.float32, copy=False).reshape(stop - start, *shape[1:])
        if not np.isfinite(values).all():
            message = f"{name} of {self.path} holds values that are not finite"
            raise AptError(message, "the file is damaged; get it again")
        return values

    def _bytes_of_last_dimension(self, name: str) -> int:
        """The bytes of one row of the last dimension."""
        block_numbers, block_bytes = gguf.GGML_QUANT_SIZES[self.type_of(name)]
        return self.shapes[name][-1] // block_numbers * block_bytes


def _shortest_decimal(value: Any) -> Any:
    """An fp32 number by its shortest decimal form: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
