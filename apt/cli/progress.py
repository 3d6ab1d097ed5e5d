"""The progress display of a command."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from math import prod
from statistics import fmean
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Display

from apt.cli.output import duration, err, has_live_display, notice, show_detail, show_event
from apt.cli.streams import printable
from apt.events import (
    BlockStarted,
    BlockTuned,
    ExpertsRemoved,
    HeldBack,
    SitePruned,
    TrainingStep,
    Working,
)

if TYPE_CHECKING:
    from apt.planning.plan import Plan

_BARS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH = 24  # of the curve in the display


class Progress:
    """The current step, the work done and the time left, on standard error.

    A changing display on a terminal; elsewhere lines.

    Args:
        text: the first step.
        notices: lines to print after the first step; an error of that step comes without them.

    Attributes:
        done: the amount of counted work that is done.
        total: the amount of all counted work; 0 if there is none, or before it is known.
    """

    def __init__(self, text: str = "", notices: list[str] | None = None) -> None:
        self.done, self.total = 0, 0
        self._origin: tuple[float, int] | None = None  # the time left counts from here
        self._notices, self._steps = notices or [], 0
        self._display = Display(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[left]}"),
            console=err,
            transient=True,
            disable=not has_live_display(),
        )
        self._task = self._display.add_task("", total=None, left="")
        if text:
            self.status(text)

    def __enter__(self) -> Self:
        self._display.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._display.stop()

    def status(self, text: str) -> None:
        """Show a step that is not counted work."""
        self._steps += 1
        if self._steps > 1:
            self.print_notices()
        show_detail(text)
        self.show(text)

    def observe(self, event: Any) -> None:
        """Show an event of the work."""

    def show(self, text: str) -> None:
        """Show a text and the counted work in the changing display."""
        self._display.update(
            self._task, description=printable(text), completed=self.done, total=self.total or None,
            left=self.left,
        )  # fmt: skip

    def print_notices(self) -> None:
        """Print the notices, once."""
        for line in self._notices:
            notice(line)
        self._notices.clear()

    def now(self) -> tuple[float, int]:
        """The time, and the work that is done."""
        return time.perf_counter(), self.done

    def begin(self, origin: tuple[float, int] | None = None) -> None:
        """Start the estimate of the time left, at an earlier `now` or at present; once."""
        self._origin = self._origin or origin or self.now()

    @property
    def seconds_left(self) -> float | None:
        """The estimated time of the remaining work; None if nothing was done since `begin`."""
        started, done_before = self._origin or (0.0, self.done)
        if not done_before < self.done < self.total:
            return None
        seconds_per_unit = (time.perf_counter() - started) / (self.done - done_before)
        return seconds_per_unit * (self.total - self.done)

    @property
    def left(self) -> str:
        """The time left as a text; empty if it is not known."""
        seconds = self.seconds_left
        return "" if seconds is None else f"{duration(seconds)} left"


class TrainingProgress(Progress):
    """Step, losses, a curve and the time left; without a display, a line per measured loss."""

    def __init__(self, notices: list[str]) -> None:
        super().__init__(notices=notices)
        self._losses = list[float]()

    def observe(self, event: Any) -> None:
        """Show an event of the training."""
        if isinstance(event, TrainingStep):
            self.done, self.total = event.step, event.steps
            self.begin()
            show_event("training step", **asdict(event))
            step = f"step {event.step}/{event.steps}  loss {event.loss:.3f}"
            self.show(f"{step}  {curve(self._losses)}")
        elif isinstance(event, HeldBack):
            if not self._losses:  # the work before the training is counted in another unit
                self._origin = None
            self._losses.append(event.loss)
            parts = [f"step {event.step}", f"loss on held-back samples {event.loss:.4f}", self.left]
            notice("  ".join(part for part in parts if part), "held back", **asdict(event))


def curve(losses: Sequence[float]) -> str:
    """A line of bars for the last losses, the highest loss as a full bar."""
    finite = [loss for loss in losses if math.isfinite(loss)][-_CURVE_WIDTH:]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    span = (high - low) or 1.0
    return "".join(_BARS[round((loss - low) / span * (len(_BARS) - 1))] for loss in finite)


class PruningProgress(TrainingProgress):
    """Block, site, relative layer error and the time left; without a display, a line per block.

    A training after the pruning is shown as by `TrainingProgress`.

    Args:
        plan: the plan of the run.
        notices: see `Progress`.
    """

    def __init__(self, plan: "Plan", notices: list[str]) -> None:
        super().__init__(notices=notices)
        self.total = sum(site.size for block in plan.blocks for site in block.pruned)
        self.total += sum(prod(extra.shape) for block in plan.blocks for extra in block.extras)
        self._number, self._blocks = 0, 0  # of the current block, from 1, and of all
        self._errors, self._began = list[float](), self.now()

    def status(self, text: str) -> None:
        """Show a step before or after the blocks."""
        self._end_block()
        super().status(text)

    def observe(self, event: Any) -> None:
        """Show an event of the pipeline, or of the training after it."""
        if isinstance(event, BlockStarted):
            self.print_notices()
            self._end_block()
            self._number, self._blocks, self._began = event.index + 1, event.blocks, self.now()
            self.show(self._block)
        elif isinstance(event, Working):
            if event.doing == "solving":  # the kept blocks of a resumed run take almost no time
                self.begin(self._began)
            self.show(f"{self._block}  {event.doing}")
        elif isinstance(event, BlockTuned):
            text = f"tuned  error {event.before:.4f} → {event.after:.4f}"
            self._show_detail(f"{self._block}  {text}", f"{event.name}  {text}", "tuned", event)
        elif isinstance(event, ExpertsRemoved):
            text = f"without experts {', '.join(map(str, event.experts))}"
            self._show_detail(f"{self._block}  experts", f"{event.name}  {text}", "experts", event)
        elif isinstance(event, SitePruned):
            self.done += event.size
            self._errors.append(event.relative_error)
            error = f"error {event.relative_error:.4f}"
            line = f"{event.name}  {error}  {duration(event.seconds)}"
            self._show_detail(f"{self._block}  {event.kind}  {error}", line, "site", event)
        else:
            super().observe(event)

    def _show_detail(self, status: str, line: str, name: str, event: Any) -> None:
        self.show(status)
        show_detail(line, name, **asdict(event))

    def _end_block(self) -> None:
        """Print a line for the finished block, unless there is a changing display."""
        if self._number:
            error = fmean(self._errors) if self._errors else None
            parts = [self._block, "" if error is None else f"mean error {error:.4f}", self.left]
            (show_detail if has_live_display() else notice)(
                "  ".join(part for part in parts if part),
                "block", block=self._number, blocks=self._blocks, error=error,
                done=self.done / max(1, self.total), seconds_left=self.seconds_left,
            )  # fmt: skip
        self._number, self._errors = 0, []

    @property
    def _block(self) -> str:
        return f"block {self._number}/{self._blocks}"
