"""The model of a run that writes a directory, with what all such runs have in common."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt.checkpoints.load import open_skeleton
from apt.checkpoints.opened import Opened
from apt.checkpoints.stored import local_directory
from apt.distributed.ranks import Ranks
from apt.engine.store import ModelStore
from apt.engine.task import WITHOUT_EFFECT, Changed, Task
from apt.engine.text import Text
from apt.errors import AptError, first_line
from apt.events import Phase
from apt.files.journal import Line
from apt.locations.paths import portable
from apt.output.card import write_card
from apt.output.location import check_space
from apt.output.report import Report, versions
from apt.output.staging import Staging
from apt.output.timeline import Timeline


class MeasurementError(AptError):
    """The model is written and verified, but a measurement of it failed.

    Attributes:
        record: the failure without the place of the model, for the report.
    """

    def __init__(self, output: Path, error: Exception) -> None:
        cause = f"{type(error).__name__}: {first_line(error)}"
        super().__init__(
            f"{output} is written and verified, but measuring it failed: {cause}",
            f"measure it with: apt-prune eval {output}",
        )
        self.record = f"measuring it failed: {cause}"
        self.__cause__ = error


class OutputStore(ModelStore, ABC):
    """A model that is read from a checkpoint, changed by a task, and written to a directory.

    The methods are called in the order in which they stand here. Only the first rank writes.
    """

    work: Staging

    def __init__(self, task: Task, timeline: Timeline, ranks: Ranks) -> None:
        super().__init__(ranks, timeline.observe, timeline.status)
        self.task, self._timeline = task, timeline
        self.work = Staging(task.options.output, task.options.overwrite)
        self._resumable = task.stream or task.resumable
        if self._resumable:
            self.journal = self.work.journal
        self.folder = self.work.folder
        self.text: Text
        self._scores: dict[str, Any] = {}
        self._problem: MeasurementError | None = None

    def check_space(self) -> None:
        """Raise if the disk has not enough space; not on resuming."""
        if self.ranks.first and not self.task.resume:
            written, output = self._written_bytes(), self.work.name
            check_space({"output": (output, self.task.space(written))})
            places = {name: getattr(self.task.options, name, None) for name in ("pack", "export")}
            more = {name: (place, written) for name, place in places.items() if place is not None}
            check_space({"output": (output, written), **more})  # no copy is larger than the output

    @abstractmethod
    def _written_bytes(self) -> int:
        """The bytes that are written to disk."""

    @contextmanager
    def opened(self) -> Iterator[None]:
        """While entered, the staging folder is locked. After an error, work is kept."""
        work = self.work
        try:
            with work.locked() if self.ranks.first else nullcontext():
                if self.ranks.first and not self._resumable:
                    work.begin()
                yield
        except AptError as error:
            mended = "resume" in error.options or "delete" in error.hint
            another = not set(error.options).issubset(WITHOUT_EFFECT)  # another run
            if self._resumable and work.worth_keeping and not (mended or another):
                error.add_hint(self._left(), "resume")
            raise

    def _left(self) -> str:
        """What an interrupted run leaves, in words."""
        if self.task.stream:
            return f"finished blocks are in {self.folder.name}: resume the run"
        return "the training can be resumed"

    @abstractmethod
    def begin(self, text: Text) -> Report:
        """Open the model, continue an interrupted run or begin anew, and begin the report."""

    def _continues(self, report: Report) -> bool:
        """True if there is work of an interrupted run to continue from; otherwise begin anew."""
        inputs: Line = self.task.inputs(self, self.text, report) | {
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "ranks": self.ranks.size,
        }
        return self.work.begin(inputs, resume=self.task.resume)

    @cached_property
    def _finished(self) -> Path | None:
        """The complete output of an interrupted run; to find it reads all of its files."""
        return self.work.done

    def is_done(self) -> bool:
        """True if an interrupted run had completed its output."""
        return self._finished is not None

    def earlier_report(self) -> Report:
        """Publish the output of a run that was interrupted after that was complete."""
        assert self._finished is not None
        report = Report.read(self._finished)
        self.ranks.wait()
        if self.ranks.first:
            self.work.finish()
        return report

    def measure(self, when: str) -> None:
        """Measure the model in its present state, unless an interrupted run has done that."""
        task, held_out = self.task, self.text.held_out
        if held_out is None or when in self._scores:
            return
        scores = {}
        phase: Phase = "measuring before" if when == "before" else "measuring after"
        with self._measurable(held_out, when) as model:
            for name in task.options.metrics:
                self.status(phase, f"measuring {name} {when}{task.event}")
                scores[name] = task.registry.evaluators.get(name).measure(model, held_out)
        self._scores[when] = scores

    @abstractmethod
    def _measurable(self, held_out: Tensor, when: str) -> AbstractContextManager[nn.Module]:
        """While entered, the present model can run on the windows ``held_out``."""

    def _measure_after(self) -> None:
        """Measure the written model, which must not be lost by a failed measurement."""
        try:
            self.measure("after")
        except Exception as error:
            self._problem = MeasurementError(self.work.name, error)

    @abstractmethod
    def write(self, changed: Changed) -> Report:
        """Write the model and the report, verify the written model, and publish it."""

    def _publish(self) -> None:
        (self.work.finish if self._resumable else self.work.publish)()

    def _saved(self, directory: Path) -> Opened:
        """The written model, without weights."""
        skeleton = self.task.skeleton
        source = replace(skeleton.source, location=str(directory), gguf=None)
        return open_skeleton(source, self.task.registry, skeleton.spec.name)

    def _record(
        self, report: Report, directory: Path, changed: Collection[str] | None = None
    ) -> Report:
        """Write the model card and the report; for ``changed`` see `Report.write`."""
        scores, held_out, skeleton = self._scores, self.text.held_out, self.task.skeleton
        if held_out is not None and scores:
            source = portable(str(self.task.options.evaluation))
            scores = {"source": source, "shape": list(held_out.shape), **scores}
        report = self.task.finished(report, scores, self._timeline.record(), self.seconds)
        if self._problem is not None:
            report = replace(report, problems=[*report.problems, self._problem.record])
        write_card(directory, report, None if skeleton.source.gguf else local_directory(skeleton))
        return report.write(directory, changed)

    def complete(self, report: Report) -> Report:
        """The report of the published output.

        Raises:
            MeasurementError: a measurement failed.
        """
        if self._problem is not None:
            raise self._problem
        return report
