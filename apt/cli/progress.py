"""The progress display of a run."""

import time
from dataclasses import asdict
from math import prod
from statistics import fmean
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn

from apt.cli.output import duration, err, has_live_display, notice, show_detail
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
        self._total += sum(prod(extra.shape) for block in plan.blocks for extra in block.extras)
        self._done, self._solving = 0, False
        self._origin = (time.perf_counter(), 0)  # when the first block that is solved began
        self._number, self._blocks = 0, 0  # of the current block, from 1, and of all
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
            self._solving |= event.doing == "solving"
            self._show(event.doing)
            return
        if isinstance(event, BlockTuned):
            text = f"tuned  error {event.before:.4f} → {event.after:.4f}"
            self._show(text)
            show_detail(f"{event.name}  {text}", "tuned", **asdict(event))
            return
        self._done += event.size
        self._show(f"{event.kind}  error {event.relative_error:.4f}")
        self._errors.append(event.relative_error)
        show_detail(
            f"{event.name}  error {event.relative_error:.4f}  {duration(event.seconds)}",
            "site", **asdict(event),
        )  # fmt: skip

    def _begin_block(self, event: BlockStarted) -> None:
        self._print_notices()
        self._end_block()
        if not self._solving:  # blocks that an earlier run has pruned take almost no time
            self._origin = (time.perf_counter(), self._done)
        self._number, self._blocks = event.index + 1, event.blocks
        self._progress.update(self._task, description=self._block, left=self._left())

    def _show(self, text: str) -> None:
        self._progress.update(
            self._task, description=f"{self._block}  {text}", completed=self._done
        )

    def _end_block(self) -> None:
        """Print a line for the finished block, unless there is a changing display."""
        if self._number:
            error = fmean(self._errors) if self._errors else None
            parts = [self._block, "" if error is None else f"mean error {error:.4f}", self._left()]
            (show_detail if has_live_display() else notice)(
                "  ".join(part for part in parts if part),
                "block", block=self._number, blocks=self._blocks, error=error,
                done=self._done / max(1, self._total), seconds_left=self._seconds_left(),
            )  # fmt: skip
        self._number, self._errors = 0, []

    def _print_notices(self) -> None:
        for line in self._notices:
            notice(line)
        self._notices.clear()

    @property
    def _block(self) -> str:
        return f"block {self._number}/{self._blocks}"

    def _seconds_left(self) -> float | None:
        started, restored = self._origin
        if not self._solving or not restored < self._done < self._total:
            return None
        share = (self._done - restored) / (self._total - restored)
        return (time.perf_counter() - started) * (1 / share - 1)

    def _left(self) -> str:
        seconds = self._seconds_left()
        return "" if seconds is None else f"{duration(seconds)} left"
