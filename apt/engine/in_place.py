"""A smaller model that has the stored bytes of a quantised checkpoint.

Blocks are expanded one at a time, for the choice of experts and blocks. The bytes of kept experts
and blocks are copied, so that no weight is rounded again, except for weights that were solved
anew: they are rounded in the kinds of numbers that the checkpoint has for them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from apt.checkpoints.copies import keep_side_files, side_files
from apt.checkpoints.opened import Opened
from apt.checkpoints.quantised import QuantisedCheckpoint, Slices
from apt.checkpoints.slicing import Slicing
from apt.checkpoints.stored import open_stored
from apt.engine.prepare import Notice
from apt.engine.prune_model import Pruning
from apt.engine.streamed import Streamed
from apt.engine.task import TaskResult
from apt.engine.text import Text
from apt.errors import AptError
from apt.events import BlockRecord, ExpertsRemoved
from apt.options import ShrinkRun
from apt.output.staging import Staging
from apt.planning.structure import Removed
from apt.pruning.block_store import BlockStore


class InPlace(Streamed):
    """A quantised checkpoint; the removed experts are recorded, and nothing is copied before."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._slicing = Slicing(self._task.skeleton, self._stored)
        self._removed = dict[str, Removed]()
        self._changed = _Changed()

    @property
    def _checkpoint(self) -> QuantisedCheckpoint:
        assert self._task.skeleton.quantised is not None
        return self._task.skeleton.quantised

    def output_bytes(self) -> int:
        """The bytes of the checkpoint: the output is smaller."""
        files = [*self._checkpoint.files]
        if self._task.skeleton.source.gguf is None:
            files += side_files(self._stored.directory)
        return sum(path.stat().st_size for path in files)

    def read(self) -> None:
        """Do nothing: the values of each block are checked when it is read."""

    def begin(self, text: Text, out: Path | None = None, *, resumed: bool = False) -> None:
        """Load the weights outside the blocks."""
        super().begin(text)

    def keep(self, name: str, block: nn.Module, done: Sequence[BlockRecord]) -> None:
        """Record the experts that a block has lost, and put new weights aside."""
        BlockStore.keep(self, name, block, done)
        planned = next(entry for entry in self._plan.blocks if entry.name == name)
        lost = [each.experts for each in done if isinstance(each, ExpertsRemoved)]
        kinds = [entry.groups.kind for entry in planned.disconnected if entry.groups.routed]
        self._removed[name] = dict(zip(kinds, lost, strict=True))
        if self.ranks.first and self._task.changes_kept_weights:
            values = dict(self._slicing.changed(planned, block, self._removed[name]))
            self._changed.add(values, self.folder / "scratch" / f"{name}.safetensors")
            self.rounded |= {key: self._checkpoint.tensors[key].stored for key in values}

    def write(self, result: TaskResult, work: Staging, text: Text) -> Path:
        """Copy the stored bytes of kept tensors, and compare the result with the checkpoint."""
        assert result.plan is not None
        self.status("writing", "copying the stored bytes")
        slices = self._slicing.slices(result.plan, self._removed)
        slices = replace(slices, values=self._changed.named(slices.sources))
        is_file = self._task.skeleton.source.gguf is not None
        self._smaller_directory = work.out / work.output.name if is_file else work.out
        if not is_file:
            work.out.rmdir()
        self._checkpoint.write_sliced(slices, self._smaller_directory)
        if not is_file:
            keep_side_files(self._stored.directory, work.out)
        self.status("writing", "verifying")
        self._verify(slices)
        return work.out

    def _verify(self, slices: Slices) -> None:
        """Raise if the written model does not open, or has other values than the checkpoint."""
        assert self._smaller_directory is not None
        small = self._task.open(self._smaller_directory)
        open_stored(small)
        assert small.quantised is not None
        if differing := small.quantised.tensors.keys() ^ slices.sources.keys():
            raise RuntimeError(f"{min(differing)} is in one of the checkpoint and its slices")
        for target, source in slices.sources.items():
            if target in slices.values:
                continue
            kept = self._checkpoint.read(source)
            if (rows := slices.rows.get(target)) is not None:
                kept = kept[list(rows)]
            if not torch.equal(kept, small.quantised.read(target)):
                raise RuntimeError(f"{target} on disk differs from {source} of the checkpoint")


class _Changed(Mapping[str, Tensor]):
    """Tensors in files, which are read one by one."""

    def __init__(self, places: Mapping[str, tuple[Path, str]] | None = None) -> None:
        self._places = dict(places or {})  # the file, and the name in it

    def add(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Write tensors into a new file."""
        if tensors:
            save_file(dict(tensors), path)
            self._places |= {name: (path, name) for name in tensors}

    def named(self, sources: Mapping[str, str]) -> "_Changed":
        """The same tensors by the names of the slices that have them as sources."""
        return _Changed({t: self._places[s] for t, s in sources.items() if s in self._places})

    def __getitem__(self, name: str) -> Tensor:
        path, key = self._places[name]
        with safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def without_rounding(run: ShrinkRun, notice: Notice) -> ShrinkRun:
    """The options of a run that keeps stored bytes, streamed and without compensation by default.

    Raises:
        AptError: an option does not serve such a run.
    """
    refused = {
        "resume": (run.resume, "such a run cannot be resumed"),
        "max_shard_size": (run.max_shard_size, "the files stay as they are"),
        "export": (run.export, "the result has the format of the model"),
    }
    for name, (value, why) in refused.items():
        if value:
            message = f"stored bytes are copied, and {why}"
            raise AptError(message, f"leave out {name}", (name,))
    if run.compensate is None and not run.error_aware:
        notice("compensate: False (default, so that no stored weight is rounded again)")
        run = replace(run, compensate=False)
    if run.error_aware is None and not run.compensate:
        run = replace(run, error_aware=False)
    return replace(run, stream=True)


def check_slices(opened: Opened, job: Pruning, run: ShrinkRun, notice: Notice) -> Pruning:
    """The pruning without the merging of experts, unless kept weights may be rounded again.

    Raises:
        AptError: other groups than experts are removed, or rows cannot be cut out.
    """
    assert opened.quantised is not None
    for groups in (entry.groups for block in job.plan.blocks for entry in block.groups):
        if not groups.routed:
            raise AptError(
                f"{opened.source.reference} is quantised, and would lose {groups.kind}",
                "remove only experts or blocks, or prune the expanded model: apt-prune convert",
                ("sizes", "keep"),
            )
    experts = job.recipe.experts
    if experts is not None and experts.merge and not (run.compensate or run.error_aware):
        notice(
            f"method {run.method}: removed experts are not merged, so that no weight is rounded "
            "again"
        )
        job = replace(job, recipe=replace(job.recipe, experts=replace(experts, merge=False)))
    slicing = Slicing(opened, open_stored(opened))
    rounded = job.recipe.changes_kept_weights
    opened.quantised.check_slices(slicing.provisional(job.plan, rounded=rounded))
    return job
