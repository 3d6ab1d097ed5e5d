"""The part of ``apt-prune prune`` and ``shrink`` after their options are read."""

from dataclasses import replace
from pathlib import Path

import typer

from apt.checkpoints.copies import REPORT
from apt.cli.interruptions import interrupted
from apt.cli.output import notice, out, show_error, show_json
from apt.cli.plan import Planned, show_plan
from apt.cli.progress import Progress, PruningProgress
from apt.cli.run_arguments import Defaults
from apt.cli.settings import save
from apt.cli.summary import first_not_finite, show_report
from apt.distributed.launch import joined
from apt.distributed.ranks import Ranks
from apt.engine.options import RunOptions
from apt.engine.planned_levels import planned_levels
from apt.engine.prepare import Prepared, already_complete, input_paths, prepare
from apt.engine.run import execute
from apt.engine.streamed import check_streamable
from apt.errors import AptError
from apt.output.report import Report
from apt.output.workplace import resumable
from apt.plugin.registry import Registry


def start(
    context: typer.Context, options: RunOptions, installed: Registry, defaults: Defaults
) -> Report | None:
    """Check a run; then show its plan (``--dry-run``), or prune.

    Args:
        context: the command with its options.
        options: the options of the run.
        installed: the registered plugins.
        defaults: the defaults that were chosen.

    Returns:
        The report, on the first rank; None if nothing was pruned.
    """
    given = context.params
    with joined() as ranks:
        prepared = prepare(options, installed, defaults.lines.append)
        if given["method"] is None:
            defaults.choose("method", prepared.method.name)
        if options.stream:
            check_streamable(prepared)
        if given["save_config"] is not None and ranks.first:
            texts = (options.calibration, options.evaluation, options.tokenizer)
            read = input_paths(prepared.shell.source, texts)
            save(context, given["save_config"], defaults.values, read)
        if given["dry_run"]:
            with Progress("checking") as progress:
                prepared = replace(prepared, plan=planned_levels(prepared, progress.status))
            show_planned(prepared, defaults.lines, as_json=given["as_json"])
            return None
        report = run(prepared, ranks, defaults.lines, as_json=given["as_json"])
        return report if ranks.first else None


def plan_of(prepared: Prepared) -> Planned:
    """The plan of a run, for printing."""
    options = prepared.options
    return Planned(
        prepared.shell,
        prepared.plan,
        prepared.samples,
        options.seqlen,
        prepared.device,
        streamed=options.stream,
        on_disk=options.activations == "disk",
        own_text=bool(prepared.augmentation.own_samples),
    )


def show_planned(prepared: Prepared, notices: list[str], *, as_json: bool) -> None:
    """Print the plan of a run."""
    for line in notices:
        notice(line)
    show_plan(plan_of(prepared), as_json=as_json)


def run(prepared: Prepared, ranks: Ranks, notices: list[str], *, as_json: bool) -> Report | None:
    """Prune, and print a summary.

    Args:
        prepared: the checked run.
        ranks: the processes that prune together.
        notices: lines about defaults, to be printed once the run has begun.
        as_json: print the summary as one JSON object.

    Returns:
        The report; None if the output was complete already.
    """
    if already_complete(prepared):
        show_complete(prepared.options.output, as_json=as_json)
        return None
    earlier = _written(prepared.options.output)
    try:
        with PruningProgress(prepared.plan, notices) as progress:
            report = execute(prepared, progress.observe, progress.status, ranks=ranks)
    except AptError:
        raise
    except Exception as error:
        error.add_note(_origins(prepared))
        raise
    except KeyboardInterrupt as error:
        raise interrupted(error, _after_interruption(prepared.options, earlier)) from None
    show_report(report, prepared.options, prepared.registry, as_json=as_json)
    if wrong := first_not_finite(report.scores, prepared.options.metrics):
        show_error(f"the {wrong} is not a finite number: the model's outputs are not")
        raise typer.Exit(1)
    return report


def show_complete(output: Path, *, as_json: bool) -> None:
    """Print that the output of a run was complete already."""
    if as_json:
        show_json({"output": str(output), "complete": True})
    else:
        out.print(f"{output}: already complete", markup=False)


def _written(output: Path) -> int | None:
    """The time at which the report of an output was written; None if there is none."""
    report = output / REPORT
    return report.stat().st_mtime_ns if report.is_file() else None


def _after_interruption(options: RunOptions, earlier: int | None) -> str:
    """The state of the output after an interruption; ``earlier`` is `_written` before the run."""
    if options.stream and resumable(options.output):
        return "to continue, give the same command with --resume"
    complete = _written(options.output) not in (None, earlier)
    return f"{options.output} is complete" if complete else "nothing was written"


def _origins(prepared: Prepared) -> str:
    """A note for a traceback: the packages of the method and the adapter of a run."""
    method, adapter = prepared.method.name, prepared.shell.spec.name
    known = prepared.registry
    methods = known.methods if prepared.structure is None else known.shrink_methods
    found = methods.origins[method], known.adapters.origins[adapter]
    note = f"method {method} comes from {found[0].distribution}, adapter {adapter} from "
    note += found[1].distribution
    if prepared.options.stream and resumable(prepared.options.output):
        note += "; the finished blocks are on disk: once it is corrected, continue with --resume"
    return note
