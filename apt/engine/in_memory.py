"""A run with the whole model in memory."""

import gc
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from apt.calibration.storage import Store
from apt.checkpoints.copies import CARD, copied_size, keep_side_files, save_model
from apt.checkpoints.load import fingerprint, load, skeleton
from apt.checkpoints.masks import MASKS, masks_of, write_masks
from apt.checkpoints.model import Model
from apt.checkpoints.smaller import smaller
from apt.checkpoints.stored import Stored, find_stored, local_directory
from apt.checkpoints.verify import failures, verify
from apt.distributed.ranks import Ranks
from apt.engine.machine import activation_store, read_dtype
from apt.engine.measures import MeasurementError, measure
from apt.engine.prepare import Prepared
from apt.engine.prune_model import Job
from apt.engine.text import Text
from apt.errors import AptError
from apt.output.card import write_card
from apt.output.location import check_space
from apt.output.report import Report, read_report
from apt.output.timeline import Timeline
from apt.output.workplace import Workplace, whole_directory, write_errors
from apt.planning.plan import Plan
from apt.pruning.block_storage import BlockStorage


class InMemoryRun:
    """A run with the whole model in memory, see `apt.engine.storage.RunStorage`.

    Args:
        prepared: the checked run.
        timeline: receives a text for each step.
        ranks: the processes that prune together. Only the first one writes.
    """

    model: nn.Module
    block_storage: BlockStorage | None = None

    def __init__(self, prepared: Prepared, timeline: Timeline, ranks: Ranks) -> None:
        self._prepared, self._ranks = prepared, ranks
        self._timeline, self._status = timeline, timeline.status
        self._dtype = read_dtype(prepared.options.dtype)
        self._started = time.perf_counter()
        self._stored = find_stored(prepared.shell) if self._dtype is None else None
        self.store: Store = activation_store(prepared.options.activations)
        self._work: Workplace
        self._text: Text
        self._loaded: Model | None = None

    def check_space(self) -> None:
        """Raise if the disk has not enough space for the output."""
        check_space(self._prepared.options.output, self._bytes())

    def _bytes(self) -> int:
        """The size of the output on disk, in bytes."""
        shell = self._prepared.shell
        if self._stored is not None:
            return copied_size(self._stored.directory, self._stored.shards)
        dtype = self._dtype or shell.dtype
        return sum(p.numel() for p in shell.module.parameters()) * dtype.itemsize

    @contextmanager
    def opened(self) -> Iterator[None]:
        """While entered, the workplace is locked; at the end the output is published."""
        if not self._ranks.first:
            yield
            return
        options = self._prepared.options
        with whole_directory(options.output, options.overwrite) as self._work:
            yield

    def readable(self) -> AbstractContextManager[None]:
        """Do nothing: the model is in memory."""
        return nullcontext()

    def begin(self, text: Text, report: Report) -> Report:
        """Load the model."""
        self._status("loading the model")
        shell, self._text = self._prepared.shell, text
        if self._stored is not None:
            self._dtype = self._stored.dtype(shell, self._prepared.plan)
        self._loaded = load(shell, self._dtype, self._prepared.device)
        self.model = self._loaded.module
        if self._stored is not None and not _is_stored(self._stored, self._loaded):
            self._stored = None
        return replace(report, model=report.model | {"sha256": fingerprint(self.model)})

    def earlier_report(self) -> Report | None:
        """None: a run in memory always starts anew."""
        return None

    def own_text(self, job: Job, tokens: Tensor) -> Tensor:
        """Generate calibration text with the model."""
        if job.augmentation.own_samples:
            self._status("generating calibration text")
        return job.with_own_text(self.model, tokens, self._ranks)

    def remember(self, key: str, compute: Callable[[], Any]) -> Any:
        """Compute the result: a run in memory always starts anew."""
        return compute()

    def measure(self, held_out: Tensor | None, when: str) -> dict[str, Any]:
        """Measure the model in its present state."""
        if held_out is None:
            return {}
        with self._prepared.shell.adapter.running(self.model):
            return {when: measure(self._prepared, self.model, held_out, when, self._status)}

    def write(self, report: Report, plan: Plan) -> Report:
        """Save the model, load the saved model, and check it against the plan."""
        adapter = self._prepared.shell.adapter
        if plan.structured:
            self.model, self._stored = smaller(self.model, adapter, plan), None
        self._status("saving and verifying")
        with write_errors(self._prepared.options.output):
            self._save(plan, self._work.out)
        written = fingerprint(self.model) if plan.structured else None
        del self.model
        self._loaded = None
        gc.collect()
        zeros = self._verify(plan, self._work.out, written)
        return self._record(report.with_zeros(zeros), self._work.out)

    def _save(self, plan: Plan, directory: Path) -> None:
        """Write the model, as a copy of its checkpoint if that is possible."""
        options, tokenizer = self._prepared.options, self._text.tokenizer
        if self._stored is not None:
            other = tokenizer if options.tokenizer else None
            self._stored.copy(directory, other, options.max_shard_size)
            self._stored.write(self.model, plan, directory)
            return
        shell = self._prepared.shell
        save_model(self.model, tokenizer, directory, shell.checkpoint, options.max_shard_size)
        if not shell.source.gguf:
            keep_side_files(local_directory(shell), directory)

    def _verify(self, plan: Plan, directory: Path, written: str | None) -> dict[str, int]:
        """Load the written model from disk and check it. It is then the model to be measured.

        A smaller model must have the hash ``written``, another one must meet its patterns.

        Returns:
            The zeros of each site on disk; empty for a smaller model.
        """
        prepared, shell = self._prepared, self._prepared.shell
        source = replace(shell.source, location=str(directory), gguf=None)
        saved = skeleton(source, prepared.registry, shell.spec.name)
        self.model = load(saved, self._dtype, prepared.device).module
        if written is not None:
            if fingerprint(self.model) != written:
                raise RuntimeError("the smaller model on disk differs from that in memory")
            return {}
        verdicts = verify(self.model, shell.adapter, plan)
        if failed := failures(verdicts):
            raise RuntimeError(f"{failed[0].name} on disk: {failed[0].detail}")
        if prepared.options.save_masks:
            with write_errors(prepared.options.output):
                write_masks(masks_of(self.model, shell.adapter), directory / MASKS)
        return {verdict.name: verdict.zeros for verdict in verdicts}

    def _record(
        self, report: Report, directory: Path, changed: Collection[str] | None = None
    ) -> Report:
        """Write the model card and the report; for ``changed`` see `Report.write`."""
        shell = self._prepared.shell
        report = replace(report, timeline=self._timeline.record())
        report = report.timed(time.perf_counter() - self._started)
        with write_errors(self._prepared.options.output):
            write_card(directory, report, None if shell.source.gguf else local_directory(shell))
            return report.write(directory, changed)

    def with_final_scores(self, report: Report) -> Report:
        """Measure the published model, and complete the report.

        Raises:
            MeasurementError: a measurement failed.
            AptError: another run has replaced the output in the meantime.
        """
        if (held_out := self._text.held_out) is None:
            return report
        output, problem, published = self._prepared.options.output, None, report.to_dict()
        try:
            report = replace(report, scores=report.scores | self.measure(held_out, "after"))
        except Exception as error:  # the pruned model must not be lost by a failed measurement
            problem = MeasurementError(output, error)
            report = replace(report, problems=[problem.record])
        if read_report(output) != published:
            fault = f"{output} was replaced by another run before its metrics were written"
            raise AptError(fault, "choose another output", ("output",))
        report = self._record(report, output, changed=[CARD])
        if problem is not None:
            raise problem
        return report


def _is_stored(stored: Stored, model: Model) -> bool:
    """True if the blocks equal the stored tensors, so that the output can be a modified copy."""
    names = [
        f"{name}.{path}"
        for name, block in model.adapter.blocks(model.module)
        for path, _ in block.named_parameters()
    ]
    return stored.equals(model.module, names)
