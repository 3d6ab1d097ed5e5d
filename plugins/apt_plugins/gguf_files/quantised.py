"""A GGUF file as a checkpoint whose tensors are expanded one by one, and sliced byte by byte."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apt.checkpoints.quantised import ExpandedTensor, QuantisedCheckpoint, Slices
from apt.errors import AptError
from apt.locations.model_source import Source

if TYPE_CHECKING:
    from apt_plugins.gguf_files.parameters import Parameter

_VALUES_AT_ONCE = 1 << 22  # values that one thread expands in one call


def open_file(source: Source) -> QuantisedCheckpoint | None:
    """The checkpoint of a GGUF file; None for other sources, or without the package gguf.

    Raises:
        AptError: the file is damaged or split, or its architecture is not read.
    """
    if source.gguf is None or find_spec("gguf") is None:
        return None
    return GgufCheckpoint(Path(source.location) / source.gguf)


class GgufCheckpoint:
    """A GGUF file as a `QuantisedCheckpoint`."""

    config: Any
    files: Sequence[Path]

    def __init__(self, path: Path) -> None:
        """Read the header; raises `AptError` as `open_file` does."""
        from apt_plugins.gguf_files.configuration import config_of
        from apt_plugins.gguf_files.stored import StoredFile

        self.file = StoredFile(path)
        self.files = [path]
        self.config = config_of(self.file)

    @cached_property
    def parameters(self) -> "Mapping[str, Parameter]":
        """The parameters of the model; raises `AptError` if the file lacks one, or has others."""
        from apt_plugins.gguf_files.parameters import parameters_of

        path, complete = self.file.path, dict[str, "Parameter"]()
        candidates = parameters_of(self.config, self.file.architecture, self.file.shapes)
        for name, parameter in candidates.items():
            if parameter is None:
                message = f"{path} has no tensor of the right size for {name} of transformers"
                raise AptError(message, "is the file complete?")
            complete[name] = parameter
        used = {tensor for parameter in complete.values() for tensor in parameter.tensors}
        for tensor in self.file.shapes.keys() - used:
            if not tensor.startswith("rope_") and not self._predicts_more(tensor):
                message = f"{path} has {tensor}, which belongs to no parameter of transformers"
                raise AptError(message, "use its original checkpoint")
        return complete

    def _predicts_more(self, tensor: str) -> bool:
        """True for a tensor of a block that predicts further tokens, which no model has."""
        extra_blocks = int(self.file.entries.get("nextn_predict_layers", 0))
        block_count = int(self.file.entries["block_count"])
        prefixes = (f"blk.{block}." for block in range(block_count - extra_blocks, block_count))
        return extra_blocks > 0 and tensor.startswith(tuple(prefixes))

    @cached_property
    def tensors(self) -> Mapping[str, ExpandedTensor]:
        """All parameters of the model; stacks of experts have the names that modules give them."""
        return {
            name: ExpandedTensor(parameter.shape, torch.float32, self._type_names(parameter))
            for name, parameter in self.parameters.items()
        }

    def _type_names(self, parameter: "Parameter") -> str:
        """The types of numbers of a parameter's tensors, such as ``q4_K`` or ``q4_K+q6_K``."""
        kinds = (self.file.type_of(tensor).name for tensor in parameter.tensors)
        return "+".join(dict.fromkeys(kind.lower().replace("_k", "_K") for kind in kinds))

    def read(self, name: str) -> Tensor:
        """A parameter in fp32; a large one is expanded in parts."""
        parameter = self.parameters[name]
        count, rest = parameter.shape[0], prod(parameter.shape[1:])
        if not parameter.by_rows or count * rest <= _VALUES_AT_ONCE:
            return self._expanded(name, parameter, None)
        values, step = torch.empty(parameter.shape), max(1, _VALUES_AT_ONCE // rest)

        def fill(start: int) -> None:
            rows = range(start, min(start + step, count))
            values[start : rows.stop] = self._expanded(name, parameter, rows)

        # Threads are enough: numpy releases the lock of the interpreter.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(fill, range(0, count, step)))
        return values

    def _expanded(self, name: str, parameter: "Parameter", rows: range | None) -> Tensor:
        """Some rows of a parameter, expanded; all rows if ``rows`` is None."""
        ranges = (rows or range(self.file.shapes[tensor][0]) for tensor in parameter.tensors)
        stored = [
            torch.from_numpy(self.file.read(tensor, indices.start, indices.stop))
            for tensor, indices in zip(parameter.tensors, ranges, strict=True)
        ]
        values = parameter.expand(stored)
        if tuple(values.shape) != (len(rows) if rows else parameter.shape[0], *parameter.shape[1:]):
            message = f"{name} of {self.file.path} has another shape than {parameter.shape}"
            raise AptError(message, "is the file damaged?")
        return values

    def check_slices(self, slices: Slices) -> None:
        """Raise `AptError` if the file cannot express a smaller model."""
        from apt_plugins.gguf_files.slicing import plan_slices

        plan_slices(self.file, self.config, self.parameters, slices)

    def write_sliced(self, slices: Slices, target: Path) -> None:
        """Write a smaller model; `QuantisedCheckpoint.write_sliced`."""
        from apt_plugins.gguf_files.slicing import write_sliced

        write_sliced(self.file, self.config, self.parameters, slices, target)
