"""The live display of a run."""

import time
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn

from apt.cli.output import duration, err
from apt.events import BlockStarted, BlockTuned, Event, Working
from apt.plan import Plan


class RunProgress:
    """Shows block, site, relative layer error and the time left, on standard error."""

    def __init__(self, plan: Plan) -> None:
        self._total = sum(site.size for block in plan.blocks for site in block.pruned)
        self._done, self._block, self._started = 0, "", time.perf_counter()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[left]}"),
            console=err,
            transient=True,
        )
        self._task = self._progress.add_task("", total=self._total, left="")

    def __enter__(self) -> "RunProgress":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def status(self, text: str) -> None:
        """Show what is being done before and after the blocks."""
        self._progress.update(self._task, description=text, left="")

    def observe(self, event: Event) -> None:
        """Show an event of the pipeline."""
        if isinstance(event, BlockStarted):
            if event.index == 0:
                self._started = time.perf_counter()
            self._block = f"block {event.index + 1}/{event.blocks}"
            self._progress.update(self._task, description=self._block, left=self._left())
            return
        if isinstance(event, Working):
            self._progress.update(self._task, description=f"{self._block}  {event.doing}")
            return
        if isinstance(event, BlockTuned):
            text = f"{self._block}  tuned  error {event.before:.4f} → {event.after:.4f}"
            self._progress.update(self._task, description=text)
            return
        self._done += event.size
        text = f"{self._block}  {event.kind}  error {event.relative_error:.4f}"
        self._progress.update(self._task, description=text, completed=self._done)

    def _left(self) -> str:
        if not self._done:
            return ""
        elapsed = time.perf_counter() - self._started
        return f"{duration(elapsed * (self._total / self._done - 1))} left"
