"""The output of the commands that start a run: notices, progress, interruptions, other forms."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from apt.checkpoints.exporting import Exported
from apt.cli.export import exported_line
from apt.cli.interruptions import interrupted
from apt.cli.output import notice, say, show_json
from apt.cli.packing import packed_line
from apt.cli.progress import Progress
from apt.distributed.launch import joined
from apt.engine.fit_task import FitTask
from apt.engine.opening import RunRequest
from apt.engine.prepare import input_paths
from apt.engine.prune_task import PruneTask
from apt.engine.run import Watcher, Work, drive
from apt.engine.task import Task
from apt.options import ConfigOptions, write_options
from apt.output.report import Report, report_of
from apt.output.staging import resumable, unpublished
from apt.packing.directory import Packed


class CommandWatcher(Watcher):
    """Prints a run of a command.

    Args:
        named: the options of the run, with all names filled in.
        config: the file of options to write.
        notices: lines about defaults. They and further lines are printed when the run has begun,
            because most errors come before.
        as_json: True to print JSON.
    """

    def __init__(
        self, request: RunRequest[Any], config: ConfigOptions, notices: list[str], *, as_json: bool
    ) -> None:
        super().__init__(self._observe, self._status, self._notice)
        self.options, self.notices, self.as_json = request.options, notices, as_json
        self.report: Report | None = None
        self._config, self._begun = config, False
        self._display: Progress

    def perform(self, request: RunRequest[Any], *, dry_run: bool = False) -> None:
        """Do the run, with the other processes of ``torchrun`` if there are some."""
        with joined(self.options.device) as ranks:
            drive(request, self, ranks, dry_run=dry_run)

    def progress(self, task: Task) -> Progress:
        """The display of the work."""
        return Progress(notices=self.notices)

    def resolved(self, task: Task) -> None:
        """Write the options of the command to the file of ``--save-config``, if it is given."""
        run = self.options
        if self._config.save_config is None:
            return
        if isinstance(task, PruneTask):
            run = replace(run, method=task.method.name)
        texts = (run.calibration, run.evaluation, run.tokenizer, getattr(run, "dense", None))
        write_options(self._config.save_config, run, input_paths(task.skeleton.source, texts))

    @contextmanager
    def during(self, work: Work, task: Task) -> Iterator[None]:
        """Show the progress. An interruption of the main work prints the state of the output."""
        self._begun = work != "checking"
        if work != "running":
            self._display = Progress(work)
            with self._display:
                yield
            return
        time_before, self._display = _report_time(self.options.output), self.progress(task)
        try:
            with self._display:
                yield
        except KeyboardInterrupt as error:
            raise interrupted(error, _after_interruption(task, time_before)) from None

    def complete(self, task: Task) -> None:
        """Print that an earlier run has completed the output."""
        output = str(self.options.output)
        if self.as_json:
            show_json({"output": output, "complete": True})
        else:
            say(f"{output}: already complete")

    def packed(self, packed: Packed) -> None:
        """Print the sizes of the packed form."""
        notice(packed_line(self.options.pack, packed))

    def exported(self, exported: Exported) -> None:
        """Print the size of the exported file, and how to keep the zeros that it lost."""
        notice(exported_line(self.options.export, exported))
        if exported.kept < exported.zeros:
            notice("for another type of the weights: the same command with --export-type TYPE")

    def _observe(self, event: Any) -> None:
        self._display.observe(event)

    def _status(self, text: str) -> None:
        self._display.status(text)

    def _notice(self, line: str) -> None:
        notice(line) if self._begun else self.notices.append(line)


def _report_time(output: Path) -> int | None:
    """The time of the last change of the report of an output; None if there is no report."""
    report = report_of(output)
    return report.stat().st_mtime_ns if report.is_file() else None


def _after_interruption(task: Task, time_before: int | None) -> str:
    """The state of the output after an interruption.

    Args:
        time_before: the `_report_time` of the output before the run.
    """
    output = task.options.output
    if (task.stream or task.resumable) and resumable(output):
        return "to continue, give the same command with --resume"
    if (directory := unpublished(output)) is not None:
        return f"the result is complete, in {directory}"
    structure = task.job.structure if isinstance(task, PruneTask) else None
    if structure is not None and structure.journal.lines:
        return "the same command continues the search"
    if isinstance(task, FitTask) and task.journal.lines:
        return "the same command takes the measured losses, and goes on from there"
    complete = _report_time(output) not in (None, time_before)
    return f"{output} is complete" if complete else "nothing was written"
