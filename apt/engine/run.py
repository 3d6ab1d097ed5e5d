"""The driver of a run: all its steps in their order, for commands and for programs."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

from apt.arguments import checked
from apt.checkpoints.exporting import Exported
from apt.distributed.ranks import Ranks
from apt.engine.costs import PlannedRun
from apt.engine.export import export_output
from apt.engine.fit_preparation import prepare_fit
from apt.engine.fit_smaller import best_task
from apt.engine.fit_speed import speed_task
from apt.engine.fit_task import FitTask
from apt.engine.forecast import forecast
from apt.engine.opening import AnyRun, RunRequest, resolve_names
from apt.engine.packing import pack_output
from apt.engine.prepare import Notice, finished_report
from apt.engine.prune_task import PruneTask, prepare_pruning
from apt.engine.reapply_task import prepare_reapplying
from apt.engine.recover_task import prepare_recovery
from apt.engine.run_output import RunOutput
from apt.engine.task import Task, shared_settings
from apt.errors import AptError
from apt.events import with_site_observer
from apt.modes import default_modes
from apt.options import FitRun, PruneRun, RecoverRun, ShrinkRun
from apt.output.report import Report
from apt.output.timeline import Timeline
from apt.packing.directory import Packed
from apt.plugin.registry import Registry, registry

Work = Literal["checking", "running", "packing", "exporting"]


class Watcher:
    """The observer of the steps of a run, such as a command that prints them; on the first rank.

    Args:
        observe, status, notice: see `run`.
    """

    def __init__(
        self,
        observe: Callable[[Any], None] = lambda event: None,
        status: Callable[[str], None] = lambda text: None,
        notice: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.observe, self.status, self.notice = observe, status, notice

    def resolved(self, task: Task) -> None:
        """Called when all options have their values. Nothing is written yet."""

    def during(self, work: Work, task: Task) -> AbstractContextManager[object]:
        """A context in which one part of the run is done, on every rank."""
        return nullcontext()

    def planned(self, planned: PlannedRun) -> None:
        """Called at the end of a dry run."""

    def complete(self, task: Task) -> None:
        """Called if an earlier run has completed the output."""

    def written(self, task: Task, report: Report) -> None:
        """Called when the output is published and measured."""

    def packed(self, packed: Packed) -> None:
        """Called when the packed form of the output is written."""

    def exported(self, exported: Exported) -> None:
        """Called when the output is exported."""


@default_modes()
@checked
def run(
    options: AnyRun,
    *,
    observe: Callable[[Any], None] = lambda event: None,
    status: Callable[[str], None] = lambda text: None,
    notice: Callable[[str], None] = lambda line: None,
    ranks: Ranks | None = None,
) -> Report:
    """Do what a command does: read a model, change it, and write a directory or a file.

    An interrupted run that is streamed, or that trains, is continued by the same call with
    ``resume=True`` in its options.

    Args:
        options: the options of the command, such as `apt.PruneRun`.
        observe: called with every event of `apt.events`. An exception that it raises ends the run.
        status: called with a text for each step outside the loop over blocks or steps.
        notice: called with a line about each option that was changed to fit the model, and about
            files that are replaced or left out.
        ranks: the processes that work together; only the first one writes.

    Returns:
        The record of the run, as in ``apt_report.json``.

    Raises:
        AptError: an option does not fit the model, the machine or the disk, or there is an error of
            the checkpoint, the text, the training or the disk. Nothing is written then, except for
            the staging folder from which the run can be resumed. If only the export of the model
            failed, its directory is kept, and the error names it.
    """
    options.check()
    request = resolve_names(options, registry(), notice)
    report = drive(request, Watcher(observe, status, notice), ranks or Ranks())
    assert report is not None
    return report


def drive(
    request: RunRequest[Any], watcher: Watcher, ranks: Ranks, *, dry_run: bool = False
) -> Report | None:
    """Do all steps of a run. Each rank calls this; only the first one writes.

    Returns:
        The report; None for a dry run.

    Raises:
        AptError: see `run`.
    """
    plugins, options = registry(), request.options
    # 1. Resolve the options and open the model without its weights: most errors are found here.
    task = resolve(request, plugins, watcher.notice, ranks)
    if ranks.first:
        watcher.resolved(task)
    # 2. A dry run ends with the plan.
    if dry_run:
        assert isinstance(task, PruneTask)
        with watcher.during("checking", task):
            planned = forecast(task, Timeline(watcher.status, watcher.observe).status)
        watcher.planned(planned)
        return None
    # 3. Change the model and write it, unless an earlier run has done that.
    if (report := finished_report(task)) is None:
        with watcher.during("running", task):
            if isinstance(task, FitTask):
                task = _best_fit(task, watcher, ranks)
            report = _change(task, watcher, ranks)
        if ranks.first:
            watcher.written(task, report)
    elif ranks.first:
        watcher.complete(task)
    # 4. Write the other forms of the output, unless step 3 has written the exported file alone.
    if not ranks.first or task.exports_alone:
        return report
    if getattr(options, "pack", None) is not None:
        with watcher.during("packing", task):
            packed = pack_output(options, options.directory, plugins, watcher.notice)
        watcher.packed(packed)
    if (file := getattr(options, "export", None)) is not None:
        with watcher.during("exporting", task):
            exported = _export_beside(task, file, watcher.notice)
        watcher.exported(exported)
    return report


def _best_fit(task: FitTask, watcher: Watcher, ranks: Ranks) -> FitTask:
    """The fit of the model, or of a smaller model that is made for it."""
    inner = Watcher(watcher.observe, watcher.status)
    status = Timeline(watcher.status, watcher.observe).status
    return best_task(task, partial(_change, watcher=inner, ranks=ranks), status)


def _export_beside(task: Task, file: Path, notice: Notice) -> Exported:
    """Export the published directory of a run."""
    directory = task.options.directory
    try:
        return export_output(task, directory, file, notice)
    except AptError as error:
        message = f"{directory} is written and verified, but not exported: {error.message}"
        raise AptError(message, error.hint) from error


def _change(task: Task, watcher: Watcher, ranks: Ranks) -> Report:
    """Step 3 of `drive`. Every rank reads the model and the text."""
    observe = watcher.observe
    if ranks.first:
        observe = with_site_observer(observe, task.registry.site_pruned)
    timeline = Timeline(watcher.status, observe)

    def convert(directory: Path, file: Path) -> Exported:
        if getattr(task.options, "pack", None) is not None:
            timeline.status("writing", "packing")
            packed = pack_output(task.options, directory, task.registry, watcher.notice)
            watcher.packed(packed)
        timeline.status("writing", "exporting")
        exported = export_output(task, directory, file, watcher.notice)
        watcher.exported(exported)
        return exported

    output = RunOutput(task, timeline, ranks, convert)
    ranks.check_alike(partial(shared_settings, task.record(), stream=task.stream))
    output.check_space()
    with output.opened():
        # a. Read the text; open the model; continue an interrupted run, or begin anew.
        timeline.status("reading text")
        text = task.read_text(ranks)
        report = output.begin(text)
        ranks.check_alike(partial(output.store.shared_inputs, text.tokens))
        if output.is_done():
            return output.earlier_report()
        # b. Measure the dense model.
        output.measure("before")
        output.store.opening = output.store.seconds  # the estimate for writing and measuring
        # c. Take from the dense model: its text, the allocation, the structure.
        text, plan = task.decide(output.store, text)
        # d. Change the model: block by block, or by training.
        result = task.change(output.store, text, plan, report)
        if not ranks.first:
            return result.report
        # e. Write it with its report, verify it on disk, and publish the directory.
        report = output.write(result)
    # f. Measure what was written, and complete the report.
    try:
        return output.complete(report)
    finally:  # the output is published, even if it could not be measured
        task.forget()


def resolve(
    request: RunRequest[Any], registry: Registry, notice: Callable[[str], None], ranks: Ranks
) -> Task:
    """Check everything that can be checked before the work begins, and fill in all defaults.

    Args:
        ranks: the processes that work together.

    Raises:
        AptError: an option does not fit the model, the machine or the disk.
    """
    if isinstance(request.options, PruneRun | ShrinkRun):
        return prepare_pruning(request, registry, notice, ranks)
    if isinstance(request.options, FitRun):
        task = prepare_fit(request, registry, notice, ranks)
        return task if request.options.speed is None else speed_task(task)
    if isinstance(request.options, RecoverRun):
        return prepare_recovery(request, registry, notice)
    return prepare_reapplying(request, registry, notice)
