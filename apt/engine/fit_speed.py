"""The fit of a packed model to a speed of decoding on this processor.

The cost of a level is the time of its products (`apt.engine.pace`). A model of random weights with
the chosen levels is measured before the weights are solved. If it misses the goal, the estimate of
the rest of a step is corrected, and levels are chosen again, from the same table of losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import apt.runtime
from apt.engine.fit_targets import PackedTarget
from apt.engine.fit_task import FitTask
from apt.engine.fitted import FitChoice, Fitted
from apt.engine.in_packed import InPackedDirectory
from apt.engine.pace import PROMPT, Pace, measured_pace, step_seconds
from apt.engine.store import ModelStore
from apt.engine.task import TaskResult
from apt.engine.text import Text
from apt.errors import AptError
from apt.fit.choice import DoesNotFitError, choose, frontier
from apt.fit.outer import Outer
from apt.fit.table import LossTable
from apt.output.report import Report
from apt.output.staging import Staging
from apt.runtime.linear import describe_kernels

MISSED = 0.05
"""The share of the goal by which a speed may differ from it."""

_CORRECTIONS = 3


@dataclass(frozen=True)
class Trial:
    """A model of random weights with chosen levels.

    Attributes:
        levels: the name of the level of each matrix.
        estimate, measured: the nanoseconds of a step.
    """

    levels: dict[str, str]
    estimate: float
    measured: float


@dataclass(frozen=True)
class FastChoice(FitChoice):
    """The choice under a budget of time.

    Attributes:
        costs: the table with nanoseconds in place of bytes, with the last correction.
        trials: the models that were measured, the first one first.
    """

    costs: LossTable
    trials: Sequence[Trial]


class InFast(InPackedDirectory):
    """A model in memory that is written as a packed directory, whose speed is measured."""

    step = 0.0  # measured seconds of a decoding step

    def output_bytes(self) -> int:
        """The bytes of the dense directory, and of the packed one."""
        return super().output_bytes() + int(self._fit.target.packed.dense)

    def write(self, result: TaskResult, work: Staging, text: Text) -> Path:
        """Write the packed directory, and measure its speed."""
        target = super().write(result, work, text)
        self.status("writing", "measuring the speed of decoding")
        self.step = step_seconds(apt.runtime.load(target), self._fit.skeleton)
        return target


@dataclass(frozen=True)
class FastTarget(PackedTarget):
    """A packed directory that decodes at a speed."""

    store = InFast


@dataclass(frozen=True, kw_only=True)
class SpeedTask(FitTask):
    """A fit whose budget is the time of a decoding step in nanoseconds.

    Attributes:
        pace: the times of this machine.
    """

    pace: Pace

    def record(self) -> dict[str, Any]:
        """All options with defaults filled in; the budget follows from the speed."""
        return {key: value for key, value in super().record().items() if key != "budget"}

    def chosen(
        self, table: LossTable, store: Fitted, heads: Sequence[str], outer: Outer | None
    ) -> FitChoice:
        """See `FitTask`; models with random weights are measured."""
        costs, trials = self.pace.table(table), list[Trial]()
        for _ in range(1 + _CORRECTIONS):
            levels = self._levels(costs)
            estimate = costs.size(levels)
            words = f"measuring the speed of the levels: estimate {1e9 / estimate:.1f} tokens/s"
            store.status("allocation", words)
            trials.append(Trial(levels, estimate, self.pace.measured(table, levels)))
            if self._miss(trials[-1]) <= MISSED:
                break
            costs = replace(costs, rest=round(costs.rest + trials[-1].measured - estimate))
        best = min(trials, key=self._miss)
        return FastChoice(table, best.levels, outer, costs, trials)

    def _levels(self, costs: LossTable) -> dict[str, str]:
        """The levels of the least loss in time; the fastest ones if none are in time."""
        try:
            return choose(costs, self.budget)
        except DoesNotFitError as error:
            return choose(costs, error.smallest)

    def _miss(self, trial: Trial) -> float:
        """The share of the goal by which a trial is slower or faster."""
        return abs(self.budget / trial.measured - 1)

    def fit_record(self, choice: FitChoice) -> dict[str, Any]:
        """The entry of the report."""
        assert isinstance(choice, FastChoice)
        trials = [[1e9 / each.estimate, 1e9 / each.measured] for each in choice.trials]
        speed = {
            "goal": self.options.speed, "dense": 1e9 / self.pace.dense,
            "highest": 1e9 / self.pace.fastest, "trials": trials, "prompt": PROMPT,
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        return {
            "speed": speed, "loss": choice.table.loss(choice.levels), "levels": choice.levels,
            "frontier": [(1e9 / time, loss) for time, loss in frontier(choice.costs)],
            "table": choice.table.record(),
        }  # fmt: skip

    def with_output(self, report: Report, store: ModelStore) -> Report:
        """The report with the size and the speed of the written output."""
        assert isinstance(store, InFast)
        speed = report.fit["speed"] | {"measured": 1 / store.step}
        if abs(speed["measured"] / speed["goal"] - 1) > MISSED:
            self.notice(
                f"speed: {speed['measured']:.1f} tokens/s measured, for a goal of "
                f"{speed['goal']:g}; is the machine busy?"
            )
        return replace(report, fit=report.fit | {"size": store.written_bytes, "speed": speed})


def speed_task(task: FitTask) -> SpeedTask:
    """The task of a fit to a speed, after the measurement of this machine.

    Raises:
        AptError: the model is fast enough already, or is never so fast.
    """
    target, options = task.target, task.options
    assert isinstance(target, PackedTarget)
    assert options.speed is not None
    threads = torch.get_num_threads()
    on = f"on this processor ({threads} thread{'s' if threads > 1 else ''})"
    task.notice(f"speed: products and decoding are measured {on}")
    dtype = task.dtype or task.skeleton.dtype
    pace = measured_pace(task.skeleton, target.form, dtype)
    dense, highest = 1e9 / pace.dense, 1e9 / pace.fastest
    task.notice(f"speed: {dense:.1f} tokens/s with dense weights, at most {highest:.1f}")
    if options.speed <= dense:
        message = f"{options.model} decodes {dense:.1f} tokens/s {on} with dense weights"
        raise AptError(message, "give a higher speed", ("speed",))
    if options.speed > highest:
        others = [name for name in options.possible_means if name not in options.means]
        allow, (_, remedy) = f"allow {', '.join(others)}" if others else "", describe_kernels()
        hints = ", or ".join(filter(None, ("give a lower speed", allow, remedy)))
        message = f"{options.model} does not decode {options.speed:g} tokens/s {on}"
        raise AptError(f"{message}: at most {highest:.1f}", hints, ("speed",))
    fast = FastTarget(**vars(target))
    return SpeedTask(**{**vars(task), "target": fast, "pace": pace})
