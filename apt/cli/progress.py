"""The progress display of a run."""

import time
from statistics import fmean
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn

from apt.cli.output import duration, err, has_live_display, log, notice, show_detail
from apt.events import BlockStarted, BlockTuned, Event, Working
from apt.planning.plan import Plan


class RunProgress:
    """Block, site, relative layer error and the time left, on standard error.

    A changing display on a terminal; elsewhere a line for each block.

    Args:
        plan: the plan of the run.
        notices: lines to print after the text has been read: reading it may fail.
    """

    def __init__(self, plan: Plan, notices: list[str]) -> None:
        self._total = sum(site.size for block in plan.blocks for site in block.pruned)
        self._done, self._block, self._started = 0, "", time.perf_counter()
        self._notices, self._steps = notices, 0
        self._errors: list[float] = []
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[left]}"),
            console=err,
            transient=True,
            disable=not has_live_display(),
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
        """Show a step before or after the blocks."""
        self._end_block()
        self._steps += 1
        if self._steps > 1:  # the first step reads the text, which may fail
            self._print_notices()
        show_detail(text)
        self._progress.update(self._task, description=text, left="")

    def observe(self, event: Event) -> None:
        """Show an event of the pipeline."""
        if isinstance(event, BlockStarted):
            self._begin_block(event)
            return
        if isinstance(event, Working):
            self._show(event.doing)
            return
        if isinstance(event, BlockTuned):
            self._show(f"tuned  error {event.before:.4f} → {event.after:.4f}")
            return
        self._done += event.size
        self._show(f"{event.kind}  error {event.relative_error:.4f}")
        self._errors.append(event.relative_error)
        show_detail(f"{event.name}  error {event.relative_error:.4f}  {duration(event.seconds)}")

    def _begin_block(self, event: BlockStarted) -> None:
        self._print_notices()
        self._end_block()
        if event.index == 0:
            self._started = time.perf_counter()
        self._block = f"block {event.index + 1}/{event.blocks}"
        self._progress.update(self._task, description=self._block, left=self._left())

    def _show(self, text: str) -> None:
        self._progress.update(
            self._task, description=f"{self._block}  {text}", completed=self._done
        )

    def _end_block(self) -> None:
        """Print a line for the finished block, unless there is a changing display."""
        if self._block:
            error = f"mean error {fmean(self._errors):.4f}" if self._errors else ""
            line = "  ".join(part for part in (self._block, error, self._left()) if part)
            (log.info if has_live_display() else notice)(line)
        self._block, self._errors = "", []

    def _print_notices(self) -> None:
        for line in self._notices:
            notice(line)
        self._notices.clear()

    def _left(self) -> str:
        if not 0 < self._done < self._total:
            return ""
        elapsed = time.perf_counter() - self._started
        return f"{duration(elapsed * (self._total / self._done - 1))} left"
