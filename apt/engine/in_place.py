"""A quantised checkpoint made smaller by copying its stored bytes.

Blocks are expanded one at a time, only to choose the experts and blocks that are removed. The bytes
of kept experts and blocks are copied, so that no weight is rounded again. Weights that compensation
changes are the exception: each is rounded again to the number type that the checkpoint stores.
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
    """The store of a quantised checkpoint; stored bytes are copied once all blocks are pruned."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._slicing = Slicing(self._task.skeleton, self._stored)
        self._removed = dict[str, Removed]()
        self._changed_tensors = _TensorFiles()

    @property
    def _checkpoint(self) -> QuantisedCheckpoint:
        assert self._task.skeleton.quantised is not None
        return self._task.skeleton.quantised

    def output_bytes(self) -> int:
        """The size of the checkpoint, which is more than that of the output."""
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
        """Record the removed experts of a block, and save its changed weights in a file."""
        BlockStore.keep(self, name, block, done)
        planned = next(entry for entry in self._plan.blocks if entry.name == name)
        removed_experts = [record.experts for record in done if isinstance(record, ExpertsRemoved)]
        kinds = [entry.groups.kind for entry in planned.disconnected if entry.groups.routed]
        self._removed[name] = dict(zip(kinds, removed_experts, strict=True))
        if self.ranks.first and self._task.changes_kept_weights:
            values = dict(self._slicing.changed(planned, block, self._removed[name]))
            self._changed_tensors.add(values, self.folder / "scratch" / f"{name}.safetensors")
            self.rounded |= {key: self._checkpoint.tensors[key].stored for key in values}

    def write(self, result: TaskResult, work: Staging, text: Text) -> Path:
        """Copy the stored bytes of kept tensors, and compare the output with the checkpoint."""
        assert result.plan is not None
        self.status("writing", "copying the stored bytes")
        slices = self._slicing.slices(result.plan, self._removed)
        slices = replace(slices, values=self._changed_tensors.named(slices.sources))
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
        """Raise if the output does not open, or if a copied tensor has other values in it."""
        assert self._smaller_directory is not None
        output = self._task.open(self._smaller_directory)
        open_stored(output)
        assert output.quantised is not None
        if differing := output.quantised.tensors.keys() ^ slices.sources.keys():
            raise RuntimeError(f"{min(differing)} is only in one of the output and its plan")
        for target, source in slices.sources.items():
            if target in slices.values:
                continue
            expected = self._checkpoint.read(source)
            if (rows := slices.rows.get(target)) is not None:
                expected = expected[list(rows)]
            if not torch.equal(expected, output.quantised.read(target)):
                raise RuntimeError(f"{target} on disk differs from {source} of the checkpoint")


class _TensorFiles(Mapping[str, Tensor]):
    """Tensors by name that lie in files, and are read one by one."""

    def __init__(self, locations: Mapping[str, tuple[Path, str]] | None = None) -> None:
        self._locations = dict(locations or {})  # the file of each tensor, and its name there

    def add(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Write tensors into a new file."""
        if tensors:
            save_file(dict(tensors), path)
            self._locations |= {name: (path, name) for name in tensors}

    def named(self, sources: Mapping[str, str]) -> "_TensorFiles":
        """The same tensors by their names in the smaller model; ``sources`` maps these names."""
        return _TensorFiles(
            {
                target: self._locations[source]
                for target, source in sources.items()
                if source in self._locations
            }
        )

    def __getitem__(self, name: str) -> Tensor:
        path, key = self._locations[name]
        with safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._locations)

    def __len__(self) -> int:
        return len(self._locations)


def without_rounding(run: ShrinkRun, notice: Notice) -> ShrinkRun:
    """The options of a run that copies stored bytes: streamed, and by default not compensated.

    Raises:
        AptError: an option has no meaning in such a run.
    """
    refused = {
        "resume": (run.resume, "such a run cannot be resumed"),
        "max_shard_size": (run.max_shard_size, "the files stay as they are"),
        "export": (run.export, "the result has the format of the model"),
        "export_type": (run.export_type, "the numbers keep their types"),
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
    """The job, without the merging of experts unless kept weights may be rounded again.

    Raises:
        AptError: other groups than experts are removed, or the format cannot store the result.
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
