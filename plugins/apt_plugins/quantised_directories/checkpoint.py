"""A directory of quantised safetensors files, as an `apt.extending.QuantisedCheckpoint`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt.checkpoints.safetensors_io import Shards
from apt.errors import AptError
from apt.extending import Slices
from apt_plugins.quantised_directories.configuration import (
    smaller_record,
    write_other_descriptions,
    write_record,
)
from apt_plugins.quantised_directories.format import (
    PLAIN,
    Cut,
    Format,
    Matrix,
    damaged,
    is_auxiliary,
    plain_tensors,
    quantised_matrices,
)
from apt_plugins.quantised_directories.renaming import Renaming
from apt_plugins.quantised_directories.writing import (
    NewTensor,
    copied,
    copied_rows,
    remove_partial,
    replaced,
    row_range,
    write_shards,
)


class QuantisedDirectory:
    """A checkpoint in a directory.

    Args:
        directory: the directory.
        record: the content of ``config.json``.
        config: the configuration of transformers, without quantisation.
        scheme: the format, which has the files of weights.

    Raises:
        AptError: a part of a matrix is missing, or the parts do not fit.
    """

    def __init__(
        self, directory: Path, record: Mapping[str, Any], config: Any, scheme: Format
    ) -> None:
        self.config = config
        self._directory, self._record, self._scheme = directory, record, scheme
        self._shards: Shards = scheme.shards
        matrices = quantised_matrices(scheme)
        used = {key for matrix in matrices.values() for key in matrix.keys.values()}
        self._matrices = {**matrices, **plain_tensors(scheme, used)}
        self.tensors = {name: matrix.expanded for name, matrix in self._matrices.items()}
        self.files = self._shards.files

    def read(self, name: str) -> Tensor:
        """A tensor, expanded; raises `AptError` if a value is not finite."""
        matrix = self._matrices[name]
        parts = self._parts(matrix)
        if PLAIN in parts:
            values = parts[PLAIN]
        else:
            expanded = matrix.expanded
            values = self._scheme.expand(self._scheme.stem(name), expanded.shape, parts)
            values = values.to(expanded.dtype).contiguous()
        if not torch.isfinite(values).all():
            file = self._shards.entries[next(iter(matrix.keys.values()))].file
            raise damaged(f"{name} in {file}", "it has values that are not finite")
        return values

    def check_slices(self, slices: Slices) -> None:
        """Raise `AptError` if the format cannot express a smaller model."""
        for name in slices.values:
            self._check_rounding(slices.sources[name])
        for name in slices.rows:
            self._check_rows(slices.sources[name])
        smaller_record(self._record, self.config, slices.config, self._renaming(slices))

    def _check_rows(self, name: str) -> None:
        """Raise `AptError` if the rows of a tensor cannot be cut out of the stored bytes."""
        matrix = self._matrices[name]
        if matrix.place is not None or Cut.NEVER in matrix.cuts.values():
            what = "a part of a stack" if matrix.place is not None else self._scheme.title
            raise AptError(
                f"{name} is stored as {what}, of which single rows cannot be cut out",
                "remove them from the original, and quantise the result",
            )

    def _check_rounding(self, name: str) -> None:
        """Raise `AptError` if new values of a tensor cannot be rounded in its kind of numbers."""
        roles = self._matrices[name].keys
        if PLAIN not in roles and not self._scheme.can_round(self._scheme.stem(name), roles):
            raise AptError(
                f"{name} is stored as {self._scheme.title}, in which APT rounds no new values",
                "choose what is removed without compensation",
                ("compensate",),
            )

    def write_sliced(self, slices: Slices, target: Path) -> None:
        """Write a smaller model, whose tensors have the stored bytes of their sources.

        The weights, split into files as before, their index, and ``config.json`` are written.

        Args:
            slices: the smaller model.
            target: a directory that does not exist.

        Raises:
            AptError: rows of a tensor cannot be cut out, new values cannot be rounded, or
                ``config.json`` cannot express the smaller model. Nothing is written then.
        """
        self.check_slices(slices)
        renaming = self._renaming(slices)
        record = smaller_record(self._record, self.config, slices.config, renaming)
        tensors = [*self._sliced(slices), *self._auxiliary_tensors(renaming)]
        parameters = sum(torch.Size(self._shape(name, slices)).numel() for name in slices.sources)
        target.mkdir()
        try:
            write_record(record, target / "config.json")
            write_other_descriptions(self._directory, target, renaming)
            write_shards(tensors, self._shards, target, parameters)
        except BaseException:
            remove_partial(target)
            raise

    def _parts(self, matrix: Matrix) -> dict[str, Tensor]:
        """The stored tensors of a matrix, by their roles."""
        if matrix.place is None:
            return {role: self._shards.read(key) for role, key in matrix.keys.items()}
        return {
            role: self._shards.read_slice(key, matrix.place) for role, key in matrix.keys.items()
        }

    def _shape(self, name: str, slices: Slices) -> tuple[int, ...]:
        """The expanded shape of a tensor of the smaller model."""
        shape = self.tensors[slices.sources[name]].shape
        return (len(slices.rows[name]), *shape[1:]) if name in slices.rows else shape

    def _renaming(self, slices: Slices) -> Renaming:
        """The new names of modules, for expanded and for stored names."""
        pairs = [(source, name) for name, source in slices.sources.items()]
        for name, source in slices.sources.items():
            keys = self._matrices[source].keys
            new_keys = self._scheme.keys(name, keys)
            pairs += [(key, new_keys[role]) for role, key in keys.items()]
        return Renaming(pairs, [*self.tensors, *self._shards.entries])

    def _sliced(self, slices: Slices) -> Iterator[NewTensor]:
        """The stored tensors of the smaller model; matrices of one stack become one tensor."""
        stacks: dict[str, dict[int, tuple[str, range | Tensor]]] = {}
        for name, source in slices.sources.items():
            matrix, new_parts = self._matrices[source], self._new_parts(name, slices)
            _, place = self._scheme.location(name)
            for role, key in self._scheme.keys(name, matrix.keys).items():
                entry = self._shards.entries[matrix.keys[role]]
                if matrix.place is not None and place is not None:
                    content = new_parts.get(role, row_range(entry, matrix.place))
                    stacks.setdefault(key, {})[place] = (matrix.keys[role], content)
                elif role in new_parts:
                    yield replaced(key, entry, new_parts[role])
                elif name in slices.rows:
                    yield self._cut(source, key, role, slices.rows[name])
                else:
                    yield copied(key, entry)
        for key, places in stacks.items():
            yield self._stack(key, places)

    def _cut(self, source: str, key: str, role: str, rows: Any) -> NewTensor:
        """The stored tensor of a role, for a matrix that loses rows."""
        matrix = self._matrices[source]
        entry = self._shards.entries[matrix.keys[role]]
        if matrix.cuts[role] is Cut.ROWS:
            return copied_rows(key, entry, rows)
        if matrix.cuts[role] is Cut.SHAPE:
            shape = self._shards.read(matrix.keys[role])
            shape.view(-1)[0] = len(rows)
            return replaced(key, entry, shape)
        return copied(key, entry)

    def _new_parts(self, name: str, slices: Slices) -> dict[str, Tensor]:
        """The parts of a tensor with new values; empty if it keeps its own."""
        values = slices.values.get(name)
        if values is None:
            return {}
        if tuple(values.shape) != self._shape(name, slices):
            raise ValueError(f"{name} has new values of shape {tuple(values.shape)}")
        source = slices.sources[name]
        matrix = self._matrices[source]
        parts = self._parts(matrix)
        if PLAIN in parts:
            return {PLAIN: values.detach().cpu().to(parts[PLAIN].dtype)}
        stem = self._scheme.stem(source)
        new_parts = self._scheme.rounded(stem, values.detach().cpu().float(), parts)
        if name in slices.rows and (unchanged := matrix.keys.keys() - new_parts.keys()):
            raise ValueError(f"{name} has new values, but not of {', '.join(unchanged)}")
        return new_parts

    def _stack(self, key: str, places: Mapping[int, tuple[str, range | Tensor]]) -> NewTensor:
        """A stack of matrices that all come from the same stack of the checkpoint."""
        if sorted(places) != list(range(len(places))) or len({k for k, _ in places.values()}) > 1:
            raise ValueError(f"{key} would have the matrices {sorted(places)} of several stacks")
        entry = self._shards.entries[places[0][0]]
        content = [places[place][1] for place in range(len(places))]
        return NewTensor(key, entry.dtype, (len(content), *entry.shape[1:]), entry, content)

    def _auxiliary_tensors(self, renaming: Renaming) -> Iterator[NewTensor]:
        """Scales of activations and the like, for modules that the smaller model has."""
        used = {key for matrix in self._matrices.values() for key in matrix.keys.values()}
        for key, entry in self._shards.entries.items():
            module, _, ending = key.rpartition(".")
            if (
                key not in used
                and is_auxiliary(key)
                and (new_module := renaming.new(module)) is not None
            ):
                yield copied(f"{new_module}.{ending}", entry)
