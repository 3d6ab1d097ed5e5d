"""A model in memory that is written as a packed directory of a given size."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from apt.checkpoints.safetensors_io import Shards
from apt.checkpoints.stored import layout_of
from apt.engine.fitted import Fitted
from apt.engine.task import TaskResult
from apt.engine.text import Text
from apt.events import BlockRecord
from apt.fit.choice import choose_first
from apt.fit.outer import outer_names
from apt.fit.table import LossTable
from apt.output.staging import Staging, write_errors
from apt.packing.compressed_tensors import write_compressed_tensors
from apt.packing.directory import Rounding, expert_tensors, linear_tensors, pack
from apt.patterns import IntegerGrid
from apt.planning.plan import PlannedBlock


class InPackedDirectory(Fitted):
    """A model in memory that is written as a packed directory."""

    def write(self, result: TaskResult, work: Staging, text: Text) -> Path:
        """Write the dense directory and its packed form; the dense model is then measured."""
        super().write(result, work, text)
        self.status("writing", "packing and verifying")
        target = work.fresh("packed")
        with write_errors(work.name):
            self._pack(work.out, target)
        self.written_bytes = self._fit.target.measured(target)
        return target

    def _pack(self, directory: Path, target: Path) -> None:
        """Write the packed form of the dense directory."""
        pack(directory, self._roundings(directory), target)

    def _roundings(self, directory: Path) -> Mapping[str, Rounding | None]:
        """The stored matrices, with the integers of those that were rounded."""
        assert self.choice is not None
        skeleton = self._fit.open(directory)
        layout = layout_of(skeleton, Shards(directory))
        names = {*linear_tensors(skeleton, layout), *expert_tensors(skeleton, layout)}
        grids = {
            piece.key: self._fit.form.level(name, level).grid
            for name, level in self.choice.levels.items()
            for piece in layout[name]
        }
        return {name: _rounding(grids.get(name)) for name in names}


class _Budgeted(InPackedDirectory):
    """A model in memory that is written as a directory of at most the budget."""

    def output_bytes(self) -> int:
        """The bytes of the dense directory, and of the output."""
        return super().output_bytes() + int(self._fit.budget)

    def write(self, result: TaskResult, work: Staging, text: Text) -> Path:
        """Write the directory, whose size is at most the budget."""
        target = super().write(result, work, text)
        if self.written_bytes > self._fit.budget:
            message = f"the directory has {self.written_bytes:,} bytes of {self._fit.budget:,}"
            raise RuntimeError(message)
        return target


class InPacked(_Budgeted):
    """A model in memory whose blocks get their levels one after the other.

    The size of a block depends on its values: on the weights that become zero by the rounding, and
    on the coding of its masks. So the levels of a block are chosen with the sizes of all blocks
    before it.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._sizes = dict[str, int]()  # of the matrices of finished blocks

    def planned(self, block: PlannedBlock) -> PlannedBlock:
        """The block with the levels that fit after the blocks before it."""
        assert self.choice is not None
        self._count_outer()
        names = self._names(block.name, {entry.site.parameter for entry in block.sites})
        table, levels = self.choice.table, self.choice.levels
        left = {name: row for name, row in table.tensors.items() if name not in self._sizes}
        rest = LossTable(left, table.rest + sum(self._sizes.values()))
        chosen = choose_first(rest, names, self._fit.form, self._fit.budget)
        self.choice = replace(self.choice, levels={**levels, **chosen})
        planned: PlannedBlock = self._fit.with_levels(block, self.choice.levels)
        return planned

    def keep(self, name: str, block: nn.Module, done: Sequence[BlockRecord]) -> None:
        """Keep a changed block, and count the bytes of its matrices."""
        super().keep(name, block, done)
        paths = {path for path, _ in block.named_parameters()}
        for full_name in self._names(name, paths):
            self._count(full_name)

    def _count_outer(self) -> None:
        """Count the bytes of a rounded head, which comes before the blocks."""
        for name in outer_names(self.model):
            if name in self._fit.form.levels and name not in self._sizes:
                self._count(name)

    def _count(self, name: str) -> None:
        """Count the bytes of a parameter with its final values."""
        assert self.choice is not None
        grid = self._fit.form.level(name, self.choice.levels[name]).grid
        self._sizes[name] = self._fit.target.coded(name, self.model.get_parameter(name), grid)

    def _names(self, block: str, paths: Collection[str]) -> list[str]:
        """The full names of the parameters of a block that have levels."""
        return [n for path in sorted(paths) if (n := f"{block}.{path}") in self._fit.form.levels]


class InCompressed(_Budgeted):
    """A model in memory that is written as a directory of compressed-tensors."""

    def _pack(self, directory: Path, target: Path) -> None:
        roundings = {n: each for n, each in self._roundings(directory).items() if each}
        if roundings:
            write_compressed_tensors(directory, self._fit.open(directory), target, roundings)
        else:  # a smaller model can fit with dense weights
            shutil.copytree(directory, target, dirs_exist_ok=True)


def _rounding(grid: IntegerGrid | None) -> Rounding | None:
    return None if grid is None else Rounding(grid.name, grid.group, exact=True)
