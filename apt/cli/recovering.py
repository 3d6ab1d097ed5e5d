"""The part of ``apt-prune recover`` after its options are read."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import typer

from apt.cli.output import duration, notice, say, show_error, show_event, show_json
from apt.cli.progress import Progress
from apt.cli.pruning import performed, save_config
from apt.distributed.launch import joined
from apt.engine.recover_task import RecoverTask, prepare_recovery
from apt.events import HeldBack, TrainingEvent, TrainingStep
from apt.options import ConfigOptions, PrintingOptions, RecoverRun
from apt.output.report import Report
from apt.plugin.registry import registry

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 24  # of the curve in the display


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
    with joined() as ranks:
        task = prepare_recovery(run, registry(), notices.append)
        if ranks.first:
            save_config(config, run, task)
        report = performed(task, ranks, TrainingProgress(notices), as_json=printing.as_json)
        if report is None or not ranks.first:
            return
    _show(report, task, as_json=printing.as_json)
    training = report.recovery["training"]
    if plot is not None:
        from apt.cli.plots import draw_training

        draw_training(training, plot, overwrite=run.overwrite)
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
    losses = dict(training["held_back"])
    stopped = f" ({training['stopped']})" if training["stopped"] else ""
    best, steps = training["best"], training["steps"]
    say(
        f"loss on the samples held back: {losses[0]:.4f} → {losses[best]:.4f} after {best} of "
        f"{steps} steps of {training['tokens']:,} tokens{stopped}"
    )
    zeros = f"{record['zeros']:,} zeros kept" if record["zeros"] else "no zeros to keep"
    say(
        f"{options.output}: {zeros}, verified on disk; kind {task.spec.name}; "
        f"{duration(record['seconds'])}"
    )


class TrainingProgress(Progress):
    """Step, losses, their curve and the time left; without a display, a line per measured loss."""

    def __init__(self, notices: list[str]) -> None:
        super().__init__(notices=notices)
        self._curve = list[float]()

    def observe(self, event: TrainingEvent) -> None:
        """Show an event of the training."""
        if isinstance(event, TrainingStep):
            self.done, self.total = event.step, event.steps
            self.begin()
            show_event("training step", **asdict(event))
            step = f"step {event.step}/{event.steps}  loss {event.loss:.3f}"
            self.show(f"{step}  {curve(self._curve)}")
        elif isinstance(event, HeldBack):
            self._curve.append(event.loss)
            parts = [f"step {event.step}", f"loss on held-back samples {event.loss:.4f}", self.left]
            notice("  ".join(part for part in parts if part), "held back", **asdict(event))


def curve(losses: Sequence[float]) -> str:
    """A line of bars for the last losses, the highest loss as a full bar."""
    shown = [loss for loss in losses if math.isfinite(loss)][-_WIDTH:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    span = (high - low) or 1.0
    return "".join(_BARS[round((loss - low) / span * (len(_BARS) - 1))] for loss in shown)
