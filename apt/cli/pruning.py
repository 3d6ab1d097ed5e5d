"""The part of ``apt-prune prune`` and ``shrink`` after their options are read."""

from dataclasses import replace
from pathlib import Path

import typer

from apt.checkpoints.copies import REPORT
from apt.cli.export import exported_line
from apt.cli.interruptions import interrupted
from apt.cli.output import is_first_rank, notice, say, show_error, show_json
from apt.cli.packing import packed_line
from apt.cli.plan import show_plan
from apt.cli.progress import Progress, PruningProgress
from apt.cli.summary import first_not_finite, show_report
from apt.distributed.launch import joined
from apt.distributed.ranks import Ranks
from apt.engine.costs import PlannedWork
from apt.engine.estimate import Planned
from apt.engine.export import export_output
from apt.engine.packing import pack_output
from apt.engine.planned_levels import planned_levels
from apt.engine.prepare import finished_report, input_paths
from apt.engine.prune_task import PruneTask, prepare_pruning
from apt.engine.run import execute
from apt.engine.task import Task
from apt.errors import AptError
from apt.options import (
    ConfigOptions,
    DryRunOptions,
    PrintingOptions,
    PruneRun,
    RecoverRun,
    ShrinkRun,
    write_options,
)
from apt.output.report import Report, peak_memory
from apt.output.staging import resumable
from apt.planning.plan import Plan
from apt.plugin.registry import registry


def start(
    run: PruneRun | ShrinkRun,
    config: ConfigOptions,
    plan: DryRunOptions,
    printing: PrintingOptions,
    notices: list[str],
) -> Report | None:
    """Check a run; then show its plan (``--dry-run``), or prune and print a summary.

    Args:
        run: the options of the run, with names.
        config, plan, printing: the other options of the command.
        notices: lines about the defaults that were chosen.

    Returns:
        The report, on the first rank; None if nothing was pruned.
    """
    with joined(run.device) as ranks:
        task = prepare_pruning(run, registry(), notices.append, ranks)
        if ranks.first:
            save_config(config, replace(run, method=task.method.name), task)
        if plan.dry_run:
            with Progress("checking") as progress:
                process = peak_memory()["cpu"]
                planned = _planned(task, planned_levels(task, progress.status), process)
            for line in notices:
                notice(line)
            show_plan(planned, as_json=printing.as_json)
            return None
        display = PruningProgress(task.job.plan, notices)
        try:
            report = performed(task, ranks, display, as_json=printing.as_json)
        except AptError:
            raise
        except Exception as error:
            error.add_note(_origins(task))
            raise
        if report is None:
            return None
        show_report(report, task, as_json=printing.as_json)
        if wrong := first_not_finite(report.scores, run.metrics):
            show_error(f"the {wrong} is not a finite number: the model's outputs are not")
            raise typer.Exit(1)
        return report if ranks.first else None


def export_result(run: PruneRun | ShrinkRun | RecoverRun) -> None:
    """Export the output, if it is asked for; the first rank alone does it."""
    if run.export is None or not is_first_rank():
        return
    with Progress("exporting"):
        done = export_output(run, registry(), notice)
    assert done is not None
    notice(exported_line(run.export, done))


def pack_result(run: PruneRun) -> None:
    """Write the packed form of the output, if it is asked for; the first rank alone does it."""
    if run.pack is None or not is_first_rank():
        return
    with Progress("packing"):
        done = pack_output(run, registry(), notice)
    assert done is not None
    notice(packed_line(run.pack, done))


def save_config(config: ConfigOptions, run: PruneRun | ShrinkRun | RecoverRun, task: Task) -> None:
    """Write the options of a command to the file of ``--save-config``, if it is given."""
    if config.save_config is not None:
        texts = (run.calibration, run.evaluation, run.tokenizer, getattr(run, "dense", None))
        write_options(config.save_config, run, input_paths(task.skeleton.source, texts))


def _planned(task: PruneTask, plan: Plan, process: int) -> Planned:
    """The plan of a run, for printing."""
    options = task.options
    return Planned(
        task.skeleton,
        plan,
        task.samples,
        options.seqlen,
        task.device,
        streamed=options.stream,
        activations=options.activations,
        own_text=bool(task.job.augmentation.own_samples),
        error_aware=task.job.recipe.error_aware,
        tuned=task.job.recipe.tuning is not None,
        factors=task.method.factors,
        works=_works(task, plan),
        process=process,
    )


def _works(task: PruneTask, plan: Plan) -> tuple[PlannedWork, ...]:
    """The work of an error-aware run of the default method; that of others is not known."""
    options, job = task.options, task.job
    usual = task.method.name == registry().default_method().name and job.recipe.error_aware
    if not usual or not isinstance(options, PruneRun):
        return ()
    allocated = job.allocation is not None
    return (
        PlannedWork(
            task.skeleton, plan, options.effort, options.samples, options.seqlen, allocated, options
        ),
    )


def performed(task: Task, ranks: Ranks, display: Progress, *, as_json: bool) -> Report | None:
    """Do a task.

    Args:
        task: the checked run.
        ranks: the processes that work together.
        display: shows the progress.
        as_json: print a JSON object if the output was complete already.

    Returns:
        The report; None if the output was complete already.
    """
    output = task.options.output
    if finished_report(task) is not None:
        if as_json:
            show_json({"output": str(output), "complete": True})
        else:
            say(f"{output}: already complete")
        return None
    earlier = _written(output)
    try:
        with display:
            return execute(task, display.observe, display.status, ranks=ranks)
    except KeyboardInterrupt as error:
        raise interrupted(error, _after_interruption(task, earlier)) from None


def _written(output: Path) -> int | None:
    """The time at which the report of an output was written; None if there is none."""
    report = output / REPORT
    return report.stat().st_mtime_ns if report.is_file() else None


def _after_interruption(task: Task, earlier: int | None) -> str:
    """The state of the output after an interruption; ``earlier`` is `_written` before the run."""
    output = task.options.output
    if (task.stream or task.resumable) and resumable(output):
        return "to continue, give the same command with --resume"
    structure = task.job.structure if isinstance(task, PruneTask) else None
    if structure is not None and structure.journal.lines:
        return "the same command continues the search"
    complete = _written(output) not in (None, earlier)
    return f"{output} is complete" if complete else "nothing was written"


def _origins(task: PruneTask) -> str:
    """A note for a traceback: the packages of the method and the adapter of a run."""
    method, adapter, known = task.method.name, task.skeleton.spec.name, task.registry
    methods = known.methods if task.job.structure is None else known.shrink_methods
    origins = methods.origins[method], known.adapters.origins[adapter]
    note = f"method {method} comes from {origins[0].distribution}, adapter {adapter} from "
    note += origins[1].distribution
    if task.stream and resumable(task.options.directory):
        note += "; the finished blocks are on disk: once it is corrected, continue with --resume"
    return note
