"""The part of ``apt-prune recover`` after its options are read."""

from pathlib import Path

import typer

from apt.cli.output import duration, say, show_error, show_json
from apt.cli.progress import TrainingProgress
from apt.cli.pruning import export_result, performed, save_config
from apt.cli.summary import training_line
from apt.distributed.launch import joined
from apt.engine.recover_task import RecoverTask, prepare_recovery
from apt.options import ConfigOptions, PrintingOptions, RecoverRun
from apt.output.report import Report
from apt.plugin.registry import registry


def start(
    run: RecoverRun,
    config: ConfigOptions,
    plot: Path | None,
    printing: PrintingOptions,
    notices: list[str],
) -> None:
    """Train, and print a summary.

    Args:
        run: the options of the run, with names.
        config: the file of options to write.
        plot: the file of the plot; None for no plot.
        printing: what is printed.
        notices: lines about defaults, to be printed once the run has begun.
    """
    with joined(run.device) as ranks:
        task = prepare_recovery(run, registry(), notices.append)
        if ranks.first:
            save_config(config, run, task)
        report = performed(task, ranks, TrainingProgress(notices), as_json=printing.as_json)
        if not ranks.first:
            return
    if report is None:
        export_result(run)
        return
    _show(report, task, as_json=printing.as_json)
    training = report.recovery["training"]
    if plot is not None:
        from apt.cli.plots import draw_training

        draw_training(training, plot, overwrite=run.overwrite)
    export_result(run)
    if training["diverged"] is not None:
        show_error(
            f"the loss diverged after {training['diverged']} steps; {run.output} has the state "
            f"after {training['best']}: use a lower --rate"
        )
        raise typer.Exit(2)


def _show(report: Report, task: RecoverTask, *, as_json: bool) -> None:
    """Print the summary of a recovery."""
    record, options = report.recovery, task.options
    training = record["training"]
    if as_json:
        show_json({"output": str(options.output), **record})
        return
    scores = record["scores"]
    for metric in options.metrics if scores else ():
        before, after = scores["before"][metric], scores["after"][metric]
        say(f"{metric} on {options.evaluation}: {before:.4g} → {after:.4g}")
    say(training_line(training))
    zeros = f"{record['zeros']:,} zeros kept" if record["zeros"] else "no zeros to keep"
    say(
        f"{options.output}: {zeros}, verified on disk; kind {task.spec.name}; "
        f"{duration(record['seconds'])}"
    )
