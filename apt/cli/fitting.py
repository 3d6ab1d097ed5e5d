"""The output of ``apt-prune fit``."""

from typing import Any

import typer

from apt.cli.output import duration, say, show, show_json, size, table
from apt.cli.progress import Progress, PruningProgress
from apt.cli.running import CommandWatcher
from apt.cli.summary import first_not_finite, show_scores, show_training, structure_line
from apt.engine.fit_task import FitTask
from apt.engine.task import Task
from apt.output.report import Report, levels_by_kind, peak_memory


class FitWatcher(CommandWatcher):
    """Prints the progress and the summary of a fit."""

    def progress(self, task: Task) -> Progress:
        """The display of the rounding."""
        assert isinstance(task, FitTask)
        return PruningProgress(task.job.plan, self.notices)

    def written(self, task: Task, report: Report) -> None:
        """Print the levels, the metrics and the size.

        Raises:
            typer.Exit: a metric is not a finite number.
        """
        assert isinstance(task, FitTask)
        if self.as_json:
            record = {key: value for key, value in report.fit.items() if key != "table"}
            show_json({"output": str(self.options.output), **record, "scores": report.scores})
        else:
            _show_candidates(report)
            _show_levels(report)
            show_scores(report, task)
            show_training(report, task)
            _show_frontier(report)
            say(
                f"{self.options.output}: {_reached(report.fit)}; predicted rise of the loss "
                f"{report.fit['loss']:.4f} nats; {duration(report.seconds)}, "
                f"peak memory {size(sum(peak_memory().values()))}"
            )
        if first_not_finite(report.scores, self.options.metrics):
            raise typer.Exit(1)
        self.report = report


def _show_candidates(report: Report) -> None:
    """Print the models that were compared, and the structure of the chosen one."""
    candidates = report.fit.get("candidates", [])
    if candidates:
        compared = table("model", ">share", ">predicted", ">measured", "chosen")
        for entry in candidates:
            kept = ", ".join(f"{count} {kind}" for kind, count in entry["kept"].items())
            compared.add_row(
                kept or "whole", f"{entry['share']:.1%}", _nats(entry["predicted"]),
                _nats(entry["measured"]), "*" if entry["chosen"] else "",
            )  # fmt: skip
        show(compared)
    if report.structure:
        say(f"smaller model: {structure_line(report.structure)}")


def _nats(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.4f}"


def _show_frontier(report: Report) -> None:
    """Print the predicted loss of the best outputs of other sizes or speeds."""
    kind, unit, per = ("speeds", "", 1) if "speed" in report.fit else ("sizes", " MiB", 2**20)
    best = [f"{cost / per:.1f}{unit} {loss:.4f}" for cost, loss in report.fit["frontier"]]
    say(f"predicted rise of the loss in nats at other {kind}: {', '.join(best)}")


def _reached(fit: dict[str, Any]) -> str:
    """The size or the speed of the output, and the goal."""
    written = fit["size"]
    if (speed := fit.get("speed")) is None:
        budget, unit = fit["budget"], 2**20
        return f"{written:,} bytes of {budget:,} ({written / unit:.1f} of {budget / unit:.1f} MiB)"
    return (
        f"{speed['measured']:.1f} tokens/s measured, {speed['trials'][-1][0]:.1f} estimated, goal "
        f"{speed['goal']:g} (dense {speed['dense']:.1f}); {written / 2**20:.1f} MiB"
    )


def _show_levels(report: Report) -> None:
    """Print the number of tensors of each kind at each level."""
    levels_table = table("tensor", "levels")
    for kind, levels in levels_by_kind(report.fit["levels"]).items():
        levels_table.add_row(kind, levels)
    show(levels_table)
