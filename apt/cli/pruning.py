"""The output of ``apt-prune prune`` and ``shrink``."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from apt.cli.output import notice, show_error
from apt.cli.plan import show_plan
from apt.cli.progress import Progress, PruningProgress
from apt.cli.running import CommandWatcher
from apt.cli.summary import first_not_finite, show_report
from apt.engine.costs import PlannedRun
from apt.engine.prune_task import PruneTask
from apt.engine.run import Work
from apt.engine.task import Task
from apt.errors import AptError
from apt.output.report import Report
from apt.output.staging import resumable


class PruningWatcher(CommandWatcher):
    """Prints the progress and the summary of a pruning, or its plan."""

    def progress(self, task: Task) -> Progress:
        """The display of the pruning."""
        assert isinstance(task, PruneTask)
        return PruningProgress(task.job.plan, self.notices)

    @contextmanager
    def during(self, work: Work, task: Task) -> Iterator[None]:
        """Show the progress; a traceback gets a note about the plugins of the run."""
        try:
            with super().during(work, task):
                yield
        except (AptError, typer.Exit):
            raise
        except Exception as error:
            if work == "running" and isinstance(task, PruneTask):
                error.add_note(_origins(task))
            raise

    def planned(self, planned: PlannedRun) -> None:
        """Print the plan of a dry run."""
        for line in self.notices:
            notice(line)
        show_plan(planned, as_json=self.as_json)

    def written(self, task: Task, report: Report) -> None:
        """Print the summary.

        Raises:
            typer.Exit: a metric is not a finite number.
        """
        assert isinstance(task, PruneTask)
        show_report(report, task, as_json=self.as_json)
        if metric := first_not_finite(report.scores, task.options.metrics):
            show_error(f"the {metric} is not a finite number: the model's outputs are not")
            raise typer.Exit(1)
        self.report = report


def _origins(task: PruneTask) -> str:
    """A note for a traceback: the packages of the method and the adapter of a run."""
    method, adapter, registry = task.method.name, task.skeleton.spec.name, task.registry
    methods = registry.methods if task.job.structure is None else registry.shrink_methods
    origins = methods.origins[method], registry.adapters.origins[adapter]
    note = f"method {method} comes from {origins[0].distribution}, adapter {adapter} from "
    note += origins[1].distribution
    if task.stream and resumable(task.options.directory):
        note += "; the finished blocks are on disk: once it is corrected, continue with --resume"
    return note
