"""The output of ``apt-prune recover``."""

from pathlib import Path
from typing import Any

import typer

from apt.cli.output import duration, say, show_error, show_json
from apt.cli.progress import Progress, TrainingProgress
from apt.cli.running import CommandWatcher
from apt.cli.summary import lost_zeros, measured_on, training_line
from apt.engine.opening import RunRequest
from apt.engine.recover_task import RecoverTask
from apt.engine.task import Task
from apt.options import ConfigOptions
from apt.output.report import Report


class RecoveryWatcher(CommandWatcher):
    """Prints the progress and the summary of a training.

    Args:
        named, config, notices, as_json: see `CommandWatcher`.
        plot: the file of the plot; None for no plot.
    """

    def __init__(
        self,
        request: RunRequest[Any],
        config: ConfigOptions,
        notices: list[str],
        plot: Path | None,
        *,
        as_json: bool,
    ) -> None:
        super().__init__(request, config, notices, as_json=as_json)
        self._plot = plot

    def perform(self, request: RunRequest[Any], *, dry_run: bool = False) -> None:
        """Do the run.

        Raises:
            typer.Exit: the training diverged.
        """
        super().perform(request, dry_run=dry_run)
        training = self.report.recovery["training"] if self.report else {"diverged": None}
        if training["diverged"] is not None:
            show_error(
                f"the loss diverged after {training['diverged']} steps; {self.options.output} has "
                f"the state after {training['best']}: use a lower --rate"
            )
            raise typer.Exit(2)

    def progress(self, task: Task) -> Progress:
        """The display of the training."""
        return TrainingProgress(self.notices)

    def written(self, task: Task, report: Report) -> None:
        """Print the summary, and draw the loss."""
        assert isinstance(task, RecoverTask)
        self.report = report
        _show(report, task, as_json=self.as_json)
        if self._plot is not None:
            from apt.cli.plots import draw_training

            draw_training(report.recovery["training"], self._plot, overwrite=self.options.overwrite)


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
        say(f"{metric} on {measured_on(report, options)}: {before:.4g} → {after:.4g}")
    say(training_line(training))
    zeros = f"{record['zeros']:,} zeros kept" if record["zeros"] else "no zeros to keep"
    zeros += lost_zeros(report)
    say(
        f"{options.output}: {zeros}, verified on disk; kind {task.spec.name}; "
        f"{duration(record['seconds'])}"
    )
