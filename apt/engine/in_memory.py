"""A run with the whole model in memory."""

import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter.recording import eval_mode
from apt.checkpoints.copies import CARD, copied_size, keep_side_files, save_model
from apt.checkpoints.load import fingerprint, load
from apt.checkpoints.masks import MASKS, filled, masks_of, write_masks
from apt.checkpoints.opened import Opened
from apt.checkpoints.smaller import smaller
from apt.checkpoints.stored import Stored, find_stored, local_directory
from apt.checkpoints.verify import failures, verify
from apt.compute import ComputeDtype
from apt.distributed.ranks import Ranks
from apt.engine.machine import activation_store
from apt.engine.output_store import OutputStore
from apt.engine.task import Changed, Task
from apt.engine.text import Text
from apt.errors import AptError
from apt.output.report import Report, read_report
from apt.output.staging import write_errors
from apt.output.timeline import Timeline
from apt.planning.plan import Plan
from apt.shrinking.same_function import check_same_function


class InMemory(OutputStore):
    """A run with the whole model in memory, see `apt.engine.output_store.OutputStore`."""

    def __init__(self, task: Task, timeline: Timeline, ranks: Ranks) -> None:
        super().__init__(task, timeline, ranks)
        self._dtype, self._stored = task.dtype, None
        if task.dtype is None and task.plan is not None:
            self._stored = find_stored(task.skeleton)
        self.activations = activation_store(getattr(task.options, "activations", "memory"))

    def _written_bytes(self) -> int:
        if self._stored is not None:
            return copied_size(self._stored.directory, self._stored.shards)
        skeleton = self.task.skeleton
        dtype = self._dtype or skeleton.dtype
        return sum(p.numel() for p in skeleton.module.parameters()) * dtype.itemsize

    def begin(self, text: Text) -> Report:
        """Load the model, and begin the report."""
        self.status("opening the model", "loading the model")
        task, self.text = self.task, text
        if self._stored is not None:
            self._dtype = self._stored.dtype(task.skeleton, task.plan)
        loaded = load(task.skeleton, self._dtype, task.device)
        self.model = loaded.module
        if self._stored is not None and not _is_stored(self._stored, loaded):
            self._stored = None
        self._prepare(loaded.dtype)
        del loaded
        report = task.begin(self, text)
        if self._resumable:
            if self.ranks.first:
                self._continues(report)
            self.journal.lines = self.ranks.share(self.journal.lines)
        return report

    def _prepare(self, stored: torch.dtype) -> None:
        """Give the model the dtype that it computes in."""
        task, dtypes = self.task, dict[str, torch.dtype]()
        if self._stored is not None and task.plan is not None and not task.plan.structured:
            dtypes = self._stored.dtypes(task.plan)
        if (asked := getattr(task.options, "compute", None)) is not None:
            self.compute_in(asked, stored, task.device, dtypes)

    @contextmanager
    def _measurable(self, held_out: Tensor, when: str) -> Iterator[nn.Module]:
        with eval_mode(self.model), self.task.skeleton.adapter.running(self.model):
            yield self.model

    def write(self, changed: Changed) -> Report:
        """Save the model, load the saved model, and check it. It is then the one to measure."""
        self.status("writing", "saving and verifying")
        plan, out, written = changed.plan, self.work.out, None
        self.restore()
        if plan is not None and plan.structured:
            adapter, tokens = self.task.skeleton.adapter, self.text.tokens
            small = smaller(self.model, adapter, plan)
            check_same_function(self.model, small, adapter, plan, tokens, self.precision.compute)
            self.model, self._stored = small, None
            written = fingerprint(self.model)
        with write_errors(self.work.name):
            self._save(plan, out)
        del self.model
        gc.collect()
        self.model = load(self._saved(out), self._dtype, self.task.device).module
        report = changed.report.with_zeros(self._verify(changed, written))
        with write_errors(self.work.name):
            if changed.save_masks:
                masks = masks_of(self.model, self.task.skeleton.adapter) if plan else changed.masks
                write_masks(masks, out / MASKS, report.orders)
            if changed.adapter is not None:
                shutil.copytree(changed.adapter, out / changed.adapter.name, dirs_exist_ok=True)
            report = self._record(report, out)
        self._publish()
        return report

    def _save(self, plan: Plan | None, directory: Path) -> None:
        """Write the model, as a copy of its checkpoint if that is possible."""
        options, tokenizer, skeleton = self.task.options, self.text.tokenizer, self.task.skeleton
        if self._stored is not None and plan is not None:
            other = tokenizer if options.tokenizer else None
            self._stored.copy(directory, other, options.max_shard_size)
            self._stored.write(self.model, plan, directory)
            return
        save_model(self.model, tokenizer, directory, skeleton.checkpoint, options.max_shard_size)
        if not skeleton.source.gguf:
            keep_side_files(local_directory(skeleton), directory)

    def _verify(self, changed: Changed, written: str | None) -> dict[str, int]:
        """Check the zeros of the saved model, or that a smaller one has the hash ``written``.

        Returns:
            The zeros of each site; empty if the task has no plan, or for a smaller model.
        """
        if written is not None:
            if fingerprint(self.model) != written:
                raise RuntimeError("the smaller model on disk differs from that in memory")
            return {}
        if changed.plan is None:
            if (wrong := filled(changed.masks, self.model)) is not None:
                raise RuntimeError(f"{wrong} on disk lost zeros")
            return {}
        verdicts = verify(self.model, self.task.skeleton.adapter, changed.plan)
        if failed := failures(verdicts):
            raise RuntimeError(f"{failed[0].name} on disk: {failed[0].detail}")
        return {verdict.name: verdict.zeros for verdict in verdicts}

    def complete(self, report: Report) -> Report:
        """Measure the published model, and complete its report.

        Raises:
            AptError: a measurement failed, or another run has replaced the output in the meantime.
        """
        if self.text.held_out is None:
            return report
        output, published = self.work.name, report.to_dict()
        ComputeDtype(self.model, self.precision.compute)
        self._measure_after()
        if not _has_report(output, published):
            fault = f"{output} was replaced by another run before its metrics were written"
            raise AptError(fault, "choose another output", ("output",))
        with write_errors(output):
            report = self._record(report, output, changed=[CARD])
        return super().complete(report)


def _has_report(directory: Path, record: dict[str, Any]) -> bool:
    """True if the report in a directory is ``record``."""
    try:
        return read_report(directory) == record
    except AptError:
        return False


def _is_stored(stored: Stored, model: Opened) -> bool:
    """True if the blocks equal the stored tensors, so that the output can be a modified copy."""
    names = [
        f"{name}.{path}"
        for name, block in model.adapter.blocks(model.module)
        for path, _ in block.named_parameters()
    ]
    return stored.equals(model.module, names)
