"""A model in memory whose weights are rounded, and which is written as one file."""

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from apt.adapter import Site
from apt.checkpoints.exporting import EncodedRows
from apt.checkpoints.load import load
from apt.engine.fitted import Fitted
from apt.engine.task import TaskResult
from apt.engine.text import Text
from apt.output.staging import Staging, write_errors
from apt.solver import Rounded


class InFile(Fitted):
    """A model in memory, of which the rounded weights are kept as the file stores them."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._parts = dict[str, dict[int, EncodedRows]]()

    def output_bytes(self) -> int:
        """The bytes of the largest file."""
        return int(self._fit.budget)

    def keep_rounded(self, name: str, site: Site | None, weight: Rounded) -> None:
        """Keep the bytes of a rounded weight."""
        index = 0 if site is None or site.expert is None else site.expert
        rows = weight.grid.encoded(weight.points, weight.indices)
        if rows is None:
            raise RuntimeError(f"the grid {weight.grid.name} has no bytes for a file")
        self._parts.setdefault(name, {})[index] = EncodedRows(weight.grid.name, rows.cpu())

    def write(self, result: TaskResult, work: Staging, text: Text) -> Path:
        """Write the file and read it back; the file is then measured."""
        self.status("writing", "writing and verifying")
        self.restore()
        del self.model
        gc.collect()
        target = work.out / work.output.name
        encoded = {name: _joined(parts) for name, parts in self._parts.items()}
        with write_errors(work.name):
            self._fit.target.write(encoded, self.trained, target)
        size, expected = target.stat().st_size, result.report.fit["expected"]
        if size != expected:
            raise RuntimeError(f"the file has {size:,} bytes, not {expected:,}")
        self.written_bytes = size
        self.model = load(self._fit.open(target), torch.float32, self._fit.device).module
        return work.out


def _joined(parts: Mapping[int, EncodedRows]) -> EncodedRows:
    """The rows of a parameter, which may be a stack of the weights of experts."""
    rows = [parts[index].rows for index in sorted(parts)]
    level = next(iter(parts.values())).level
    return EncodedRows(level, rows[0] if len(rows) == 1 else torch.stack(rows))
