"""The output of a run: staged, written, verified, measured, reported and published."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt.adapter import Samples
from apt.calibration.storage import DiskStore
from apt.checkpoints.copies import CARD
from apt.checkpoints.exporting import Exported
from apt.checkpoints.masks import MASKS, Masks, block_masks, filled, write_masks
from apt.checkpoints.stored import local_directory
from apt.checkpoints.verify import zeros_of
from apt.distributed.ranks import Ranks
from apt.engine.fit_task import FitTask
from apt.engine.in_memory import InMemory
from apt.engine.in_place import InPlace
from apt.engine.streamed import Streamed
from apt.engine.task import WITHOUT_EFFECT, Task, TaskResult
from apt.engine.text import Text
from apt.errors import AptError, first_line
from apt.evaluation.outputs import Outputs, dense_outputs
from apt.events import Phase
from apt.files.journal import Line
from apt.locations.paths import portable
from apt.output.card import mark_as_packed, write_card
from apt.output.location import check_space
from apt.output.report import Report, read_report, versions
from apt.output.staging import FileStaging, Staging, write_errors
from apt.output.timeline import Timeline
from apt.packing.directory import OWN_CODE_FILE
from apt.runtime.entries import is_packed


class MeasurementError(AptError):
    """The model is written and verified, but a measurement of it failed.

    Attributes:
        record: the failure in words for the report, without the path of the model.
    """

    def __init__(self, output: Path, error: Exception) -> None:
        cause = f"{type(error).__name__}: {first_line(error)}"
        super().__init__(
            f"{output} is written and verified, but measuring it failed: {cause}",
            f"measure it with: apt-prune eval {output}",
        )
        self.record = f"measuring it failed: {cause}"
        self.__cause__ = error


class RunOutput:
    """The output of a run that reads a checkpoint and writes a directory.

    The methods are called in the order of their definition. Only the first rank writes.

    Args:
        task, timeline, ranks: the run.
        convert: exports a directory, the first argument, to a file, the second, if the output is
            the file alone; and writes all other forms of the directory.

    Attributes:
        store: the model.
    """

    def __init__(
        self,
        task: Task,
        timeline: Timeline,
        ranks: Ranks,
        convert: Callable[[Path, Path], Exported],
    ) -> None:
        self.task, self.ranks, self._timeline, self._convert = task, ranks, timeline, convert
        kind = _store_kind(task)
        self.store: InMemory | Streamed = kind(task, ranks, timeline.observe, timeline.status)
        self._is_file = task.writes_file or task.exports_alone
        place = (task.options.output, task.options.overwrite)
        self.work = FileStaging(*place) if self._is_file else Staging(*place)
        self.store.folder = self.work.folder
        self._resumable = (task.stream and not task.in_place) or task.resumable
        if self._resumable:
            self.store.journal = self.work.journal
        if getattr(task.options, "activations", None) == "disk":
            self.store.activations = DiskStore(self.work.scratch)
        self.text: Text
        self._scores: dict[str, Any] = dict(task.known_scores)
        self._problem: MeasurementError | None = None
        self._dense_outputs: Outputs | None = None

    @property
    def _measures_first(self) -> bool:
        """True if the written model is measured before it is published."""
        return self.task.stream or self._is_file

    def check_space(self) -> None:
        """Raise if the disk has too little space, unless the run is resumed."""
        if self.ranks.first and not self.task.resume:
            size, output = self.store.output_bytes(), self.work.name
            check_space({"output": (output, self.task.space(size))})
            places = {name: getattr(self.task.options, name, None) for name in ("pack", "export")}
            forms = {name: (place, size) for name, place in places.items() if place is not None}
            # No copy is larger than the output.
            check_space({"output": (output, size), **forms})

    def _errors(self) -> AbstractContextManager[None]:
        """While entered, errors of the disk become an `AptError`."""
        if self._resumable and self.task.stream:
            return write_errors(self.work.name, "correct that, then resume the run", ("resume",))
        return write_errors(self.work.name)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """While entered, the staging folder is locked. An error says how to continue the work."""
        work = self.work
        with self._errors() if self.task.stream else nullcontext():
            try:
                with work.locked() if self.ranks.first else nullcontext():
                    if self.ranks.first and not self._resumable:
                        work.begin()
                    yield
            except AptError as error:
                has_remedy = "resume" in error.options or "delete" in error.hint
                is_other_run = not set(error.options).issubset(WITHOUT_EFFECT)
                if self._resumable and work.worth_keeping and not (has_remedy or is_other_run):
                    error.add_hint(self._resume_hint(), "resume")
                raise

    def _resume_hint(self) -> str:
        """The hint for an interrupted run whose work is kept."""
        if self.task.stream:
            return f"finished blocks are in {self.work.folder.name}: resume the run"
        return "the training can be resumed"

    def begin(self, text: Text) -> Report:
        """Open the model, continue an interrupted run or start one, and start the report."""
        self.text, store, resumed = text, self.store, False
        store.read()
        report = self.task.begin(store, text)
        if self._resumable:
            resumed = self.ranks.first and self._continues(report)
            store.journal.lines = self.ranks.share(store.journal.lines)
            self._read_scores()
        if not self.is_done():
            store.begin(text, self.work.out, resumed=resumed)
        return report

    def _continues(self, report: Report) -> bool:
        """Start the output; True if the work of an interrupted run is continued."""
        inputs: Line = self.task.inputs(self.store, self.text, report) | {
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "ranks": self.ranks.size,
        }
        return self.work.begin(inputs, resume=self.task.resume)

    def _read_scores(self) -> None:
        """Read the metrics that an interrupted run has measured from the journal."""
        try:
            for scores in self.work.journal.values("scores"):
                self._scores |= scores
        except (TypeError, ValueError) as error:
            raise self.work.journal.damaged("its journal has no scores") from error

    @cached_property
    def _finished(self) -> Path | None:
        """The complete output of an interrupted run; cached, because all files are hashed."""
        return self.work.finished_output

    def is_done(self) -> bool:
        """True if an interrupted run had completed its output."""
        return self._finished is not None

    def earlier_report(self) -> Report:
        """Publish the complete output of an interrupted run, and return its report."""
        assert self._finished is not None
        report = Report.read(self._finished)
        self.ranks.wait()
        return self._publish(report) if self.ranks.first else report

    def measure(self, when: str) -> None:
        """Measure the model in its present state, unless an interrupted run has measured it."""
        task, store, held_out = self.task, self.store, self.text.held_out
        if held_out is None or (when in self._scores and isinstance(held_out, Tensor)):
            return
        scores = {}
        phase: Phase = "measuring before" if when == "before" else "measuring after"
        with store.measurable(held_out, when) as model:
            if when == "before" and isinstance(held_out, Samples):
                store.status(phase, "computing the outputs of the dense model")
                dense_model = task.dense_model() or model
                self._dense_outputs, held_out = dense_outputs(dense_model, held_out)
                self.text = replace(self.text, held_out=held_out)
            for name in task.options.metrics:
                spec = task.registry.evaluators.get(name)
                store.status(phase, f"measuring {name} {when}{task.event}")
                dense = (self._dense_outputs,) if spec.dense else ()
                scores[name] = spec.measure(model, held_out, *dense)
        self._scores[when] = scores
        if task.stream:
            store.journal.add({"scores": {when: scores}})

    def _measure_after(self) -> None:
        """Measure the written model. After a failed measurement the model is kept."""
        try:
            self.measure("after")
        except Exception as error:
            self._problem = MeasurementError(self.work.name, error)

    def write(self, result: TaskResult) -> Report:
        """Write the model and the report, verify the written model, and publish it.

        A streamed run, which can be resumed, and a run whose output is one file are measured
        before the report is written. Other runs are measured after the publication, see `complete`.
        """
        work = self.work
        directory = self.store.write(result, work, self.text)
        zeros, masks = self.verify(result)
        if self._measures_first:
            self._measure_after()
        report = self.task.with_output(result.report.with_zeros(zeros), self.store)
        with self._errors():
            if result.save_masks:
                write_masks(masks, directory / MASKS, report.orders)
            if result.adapter is not None:
                place = directory / result.adapter.name
                shutil.copytree(result.adapter, place, dirs_exist_ok=True)
            report = self._record(report, directory)
        if directory != work.out:
            work.replace_out(directory)
        return self._publish(report)

    def _publish(self, report: Report) -> Report:
        """Publish the complete output, unless it is published, and return its report."""
        work = self.work
        if isinstance(work, FileStaging) and self.task.exports_alone and work.has_directory:
            report = self._export(work, report)
        (work.finish if self._resumable else work.publish)()
        return report

    def _export(self, work: FileStaging, report: Report) -> Report:
        """Replace the complete directory by the exported file, and return the report of the file.

        Raises:
            AptError: the export failed. The directory is then moved beside the place of the file.
        """
        if self._resumable:  # an interrupted export is repeated
            work.record_finished(work.out)
        folder = work.fresh("file")
        try:
            exported = self._convert(work.out, folder / work.output.name)
            counts = {name: value for name, value in vars(exported).items() if name != "notes"}
            report = replace(report, export=counts).write(folder)
        except AptError as error:
            place = work.move_directory_out()
            raise AptError(
                f"{work.name} is not written: {error.message}",
                f"{error.hint}; the model is complete, in {place}: "
                f"apt-prune export {place} -o {work.name}".removeprefix("; "),
            ) from error
        work.replace_out(folder)
        return report

    def verify(self, result: TaskResult) -> tuple[dict[str, int], Masks]:
        """Check the zeros of the written model.

        Returns:
            The zeros of each site of the plan, empty for a smaller model; and the masks, if they
            are saved.
        """
        plan, masks = result.plan, dict(result.masks)
        if plan is None:
            if (name := filled(masks, self.store.model)) is not None:
                raise RuntimeError(f"{name} on disk lost zeros")
            return {}, masks
        if plan.structured:
            return {}, masks
        if self.task.stream:
            self.store.status("writing", "verifying")

        def collect(name: str, block: nn.Module) -> None:
            if result.save_masks:
                masks.update(block_masks(name, block, self.task.skeleton.adapter))

        return zeros_of(plan, self.store.written, collect), masks

    def _record(self, report: Report, directory: Path, changed: list[str] | None = None) -> Report:
        """Write the model card and the report; for ``changed`` see `Report.write`."""
        scores, held_out, skeleton = self._scores, self.text.held_out, self.task.skeleton
        if held_out is not None and scores:
            source = portable(str(self.task.options.evaluation))
            scores = {"source": source, "shape": list(held_out.shape), **scores}
        seconds = self.store.seconds
        report = self.task.finished(report, scores, self._timeline.record(), seconds)
        if self._problem is not None:
            report = replace(report, problems=[*report.problems, self._problem.record])
        if not self.task.writes_file:
            original = None if skeleton.source.gguf else local_directory(skeleton)
            write_card(directory, report, original)
            if is_packed(directory):
                mark_as_packed(directory, has_code=(directory / OWN_CODE_FILE).is_file())
        return report.write(directory, changed)

    def complete(self, report: Report) -> Report:
        """Measure the published model, unless it was measured, and return its complete report.

        Raises:
            AptError: a measurement failed, or another run has replaced the output in the meantime.
        """
        if self.text.held_out is not None and not self._measures_first:
            output, published = self.work.name, report.to_dict()
            self._measure_after()
            if not _has_report(output, published):
                message = f"{output} was replaced by another run before its metrics were written"
                raise AptError(message, "choose another output", ("output",))
            with self._errors():
                report = self._record(report, output, changed=[CARD])
        if self._problem is not None:
            raise self._problem
        return report


def _store_kind(task: Task) -> type[InMemory] | type[Streamed]:
    """The kind of store of a task."""
    if isinstance(task, FitTask):
        return task.target.store
    return InPlace if task.in_place else Streamed if task.stream else InMemory


def _has_report(directory: Path, record: dict[str, Any]) -> bool:
    """True if the report in a directory is ``record``."""
    try:
        return read_report(directory) == record
    except AptError:
        return False
