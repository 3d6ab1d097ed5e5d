"""A whole run, from the options to a directory on disk: the same for all tasks."""

from collections.abc import Callable
from functools import partial
from typing import Any

from apt.arguments import checked
from apt.distributed.ranks import Ranks
from apt.engine.export import export_output
from apt.engine.opening import with_names
from apt.engine.packing import pack_output
from apt.engine.prepare import finished_report
from apt.engine.prune_task import prepare_pruning
from apt.engine.rank_inputs import read, running
from apt.engine.reapply_task import prepare_reapplying
from apt.engine.recover_task import prepare_recovery
from apt.engine.run_output import RunOutput
from apt.engine.task import Task
from apt.events import telling
from apt.modes import usual_modes
from apt.options import PruneRun, ReapplyRun, RecoverRun, ShrinkRun
from apt.output.report import Report
from apt.output.timeline import Timeline
from apt.plugin.registry import Registry, registry

AnyRun = PruneRun | ShrinkRun | RecoverRun | ReapplyRun


@usual_modes()
@checked
def run(
    options: AnyRun,
    *,
    observe: Callable[[Any], None] = lambda event: None,
    status: Callable[[str], None] = lambda text: None,
    notice: Callable[[str], None] = lambda line: None,
    ranks: Ranks | None = None,
) -> Report:
    """Do what a command does: read a model, change it, and write a directory.

    An interrupted run that is streamed, or that trains, is continued by the same call with
    ``resume=True`` in its options.

    Args:
        options: the options of the command, such as `apt.PruneRun`.
        observe: called with every event of `apt.events`. An exception that it raises ends the run.
        status: called with a text for each step outside the loop over blocks or steps.
        notice: called with a line about each option that was changed to fit the model, and about
            what is replaced or left out.
        ranks: the processes that work together; only the first writes.

    Returns:
        The record of the run, as in ``apt_report.json``.

    Raises:
        AptError: an option does not fit the model, the machine or the disk, or there is an error of
            the checkpoint, the text, the training or the disk. Nothing is written then, except for
            the staging folder from which the run can be resumed.
    """
    options.check()
    if not isinstance(options, ReapplyRun):
        options = with_names(options, registry(), notice)
    task = prepare(options, registry(), notice, ranks)
    report = finished_report(task) or execute(task, observe, status, ranks=ranks)
    if ranks is None or ranks.first:
        if isinstance(options, PruneRun):
            pack_output(options, task.registry, notice)
        if not isinstance(options, ReapplyRun):
            export_output(options, task.registry, notice)
    return report


def prepare(
    options: AnyRun,
    registry: Registry,
    notice: Callable[[str], None] = lambda line: None,
    ranks: Ranks | None = None,
) -> Task:
    """Check everything that can be checked before the work begins, with the names of `with_names`.

    Args:
        ranks: the processes that work together.

    Raises:
        AptError: an option does not fit the model, the machine or the disk.
    """
    if isinstance(options, PruneRun | ShrinkRun):
        return prepare_pruning(options, registry, notice, ranks)
    if isinstance(options, RecoverRun):
        return prepare_recovery(options, registry, notice)
    return prepare_reapplying(options, registry, notice)


def execute(
    task: Task,
    observe: Callable[[Any], None],
    status: Callable[[str], None],
    *,
    ranks: Ranks | None = None,
) -> Report:
    """Read text and model, do the task, write and verify, measure, and complete the report.

    All ranks read: a streamed output must be in a place that every process can read.
    """
    ranks = ranks or Ranks()
    if ranks.first:
        observe = telling(observe, task.registry.site_pruned)
    timeline = Timeline(status, observe)
    output = RunOutput(task, timeline, ranks)
    ranks.check_alike(partial(running, task.record(), stream=task.stream))
    output.check_space()
    with output.opened():
        timeline.status("reading text")
        text = task.read_text(ranks)
        report = output.begin(text)
        ranks.check_alike(partial(read, output.store, text.tokens))
        if output.is_done():
            return output.earlier_report()
        output.measure("before")
        changed = task.change(output.store, text, report)
        if not ranks.first:
            return changed.report
        report = output.write(changed)
    task.forget()
    return output.complete(report)
