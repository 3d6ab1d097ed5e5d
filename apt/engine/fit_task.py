"""The task of ``apt-prune fit``: the best output of a given size."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from apt.checkpoints.load import open_skeleton
from apt.checkpoints.opened import Opened
from apt.engine.fit_tables import MEASURE
from apt.engine.fit_targets import FitTarget
from apt.engine.fitted import FitChoice, Fitted
from apt.engine.prepare import ignore_notice
from apt.engine.prune_model import Pruning, prune_model, with_own_text
from apt.engine.prune_task import CalibratedTask, train_in_time
from apt.engine.pruning_plan import fit_job
from apt.engine.recipes import record
from apt.engine.store import ModelStore
from apt.engine.task import TaskResult
from apt.engine.text import Text
from apt.engine.timed_run import norms_after
from apt.errors import AptError
from apt.files.journal import Journal, Line
from apt.fit.choice import choose_first, frontier
from apt.fit.levels import FileForm, block_with_levels, with_levels
from apt.fit.losses import Prune, measured_levels
from apt.fit.outer import Outer, outer_names
from apt.fit.sensitivities import forward_sums, sensitivities
from apt.fit.table import LossTable
from apt.locations.model_source import Source, find
from apt.options import FitRun
from apt.output.report import Report, versions
from apt.patterns import Pattern, keeps_all
from apt.planning.plan import Plan, PlannedBlock
from apt.solver import Gram, SolverOptions, rounded, solve_live


@dataclass(frozen=True)
class Smaller:
    """A smaller model that was made from the model of a run.

    Attributes:
        whole: the beginning of a report about the whole model, with its metrics.
        structure: the kept and removed parts, see `apt.output.report.Report`.
        rise: the rise of the loss of held-back calibration text, in nats for each token.
        table: the table of losses of the whole model, for the report.
        journal: the journal of the comparison.
    """

    whole: Report
    structure: dict[str, Any]
    rise: float
    table: LossTable
    journal: Journal


@dataclass(frozen=True, kw_only=True)
class FitTask(CalibratedTask):
    """The choice of a level for each tensor under a budget, and the solves for these levels.

    Attributes:
        target: the output.
        budget: the largest size of its weights in bytes; for a speed the largest time of a decoding
            step in nanoseconds.
        table: the table of losses of an earlier run, and the hash of the weights of its model;
            None to measure the losses.
        journal: the journal with the table of an interrupted run.
        smaller: the smaller model that takes the place of the model; the model on disk is then the
            smaller one, and its weights have changed.
        candidates: the records of the models that were compared, for the report.
        spent: the seconds of the comparison.
        dense: the location of the model that the user gave.
        ends: the end of the given time, of `time.perf_counter`; None without a given time.
    """

    options: FitRun
    target: FitTarget
    budget: int
    table: tuple[LossTable, str] | None = None
    journal: Journal = field(default_factory=Journal)
    smaller: Smaller | None = None
    candidates: tuple[dict[str, Any], ...] = ()
    spent: float = 0.0
    dense: Source
    ends: float | None = None
    event = " fitting"

    @property
    def form(self) -> FileForm:
        """The levels of the tensors."""
        return self.target.form

    @property
    def in_place(self) -> bool:
        """False: the values are rounded, even if they come from a quantised checkpoint."""
        return False

    @property
    def writes_file(self) -> bool:
        """True if the output is one file."""
        return self.target.is_file

    def record(self) -> dict[str, Any]:
        """All options with defaults filled in, as values for JSON."""
        defaults = record(self.job.recipe, self.job.augmentation, None)
        return self.options.record() | defaults | {"budget": self.budget}

    @property
    def known_scores(self) -> dict[str, Any]:
        """The metrics of the whole model, if this is a smaller one."""
        return {} if self.smaller is None else self.smaller.whole.scores

    def begin(self, store: ModelStore, text: Text) -> Report:
        """A report with the options, the model that the user gave, and the text."""
        report = super().begin(store, text)
        if self.smaller is None:
            return report
        whole = self.smaller.whole
        return replace(report, model=whole.model, earlier=whole.earlier)

    def decide(self, store: ModelStore, text: Text) -> tuple[Text, Plan]:
        """The text with generated samples, and the plan; the store has the choice of levels."""
        assert isinstance(store, Fitted)
        text = with_own_text(store, text, self.job)
        table = self.losses(store, text)
        outer, heads = None, [n for n in outer_names(store.model) if n in self.form.levels]
        if heads:
            store.status("allocation", "measuring the inputs of the head")
            outer = forward_sums(store.model, self.job.adapter, text.windows, table.gradient)
        store.choice = self.chosen(table, store, heads=heads, outer=outer)
        return text, self.job.plan

    def chosen(
        self, table: LossTable, store: Fitted, heads: Sequence[str], outer: Outer | None
    ) -> FitChoice:
        """The choice of levels.

        Args:
            heads: the embedding and the head, if they have levels.
            outer: the statistics of them.
        """
        return FitChoice(table, choose_first(table, heads, self.form, self.budget), outer)

    def losses(self, store: ModelStore, text: Text) -> LossTable:
        """The table of losses: the given one, that of an interrupted run, or a new one.

        Args:
            text: the text with generated samples.
        """
        if self.table is not None:
            table = self._given(store)
        else:
            inputs = self.inputs_of_losses(store, text)
            record = self.remembered(inputs, "table", lambda: self._measured(store, text))
            table = LossTable.read(record)
        return replace(table, tied=self.form.tied)

    def _given(self, store: ModelStore) -> LossTable:
        """The table of an earlier run; raises `AptError` if its model had other weights."""
        assert self.table is not None
        table, weights = self.table
        if weights != store.weights:
            message = f"{self.options.table_from} was made from a model with other weights"
            raise AptError(message, MEASURE, ("table_from",))
        return table

    def inputs_of_losses(self, store: ModelStore, text: Text) -> Line:
        """All inputs of the measured losses, for the journal."""
        sizes = {n: [[x.name, x.size] for x in row] for n, row in self.form.levels.items()}
        return store.shared_inputs(text.windows) | {
            "sizes": sizes, "damping": self.job.recipe.solver.damping, "versions": versions(),
        }  # fmt: skip

    def remembered(self, inputs: Line, key: str, compute: Callable[[], Any]) -> Any:
        """A value for JSON that an interrupted run with these inputs has computed, or a new one."""
        journal = self.journal
        if not journal.serves(inputs) or not journal.values(key):
            value = compute()
            if not journal.serves(inputs):
                journal.begin(inputs)
            journal.add({key: value})
        return journal.values(key)[-1]

    def _measured(self, store: ModelStore, text: Text) -> dict[str, Any]:
        """The record of a new table of losses."""

        def step(work: str) -> Callable[[int, int], None]:
            began = time.perf_counter()

            def show(done: int, total: int) -> None:
                store.status("allocation", f"{work} {done} of {total}")
                self._check_time((time.perf_counter() - began) / done * (total - done))

            return show

        model, adapter, plan = store.model, self.job.adapter, self.job.plan
        given = sensitivities(model, adapter, plan, text.windows, step("gradients: sample"))
        levels = measured_levels(
            model, adapter, plan, given, self.form.levels, step("losses of the levels: block"),
            self._prune(),
        )  # fmt: skip
        return LossTable(levels, self.form.rest, given.outer.gradient).record()

    def _check_time(self, left: float) -> None:
        """Raise if the given time ends before the table of losses, in ``left`` seconds."""
        if self.ends is not None and (late := time.perf_counter() + left - self.ends) > 0:
            given = self.options.minutes or 0.0
            message = f"{given:g} minutes are too few: the table of losses alone takes about "
            raise AptError(
                f"{message}{given + late / 60:.2g}", "give more, or leave them out", ("minutes",)
            )

    @property
    def folder(self) -> Path:
        """A hidden folder beside the output, for smaller models that are compared."""
        real = self.options.directory.resolve()
        return real.with_name(f".{real.name}.smaller")

    def _prune(self) -> Prune:
        """The solve for the table of losses, which does not depend on the effort of the run."""
        options = SolverOptions(damping=self.job.recipe.solver.damping)

        def prune(weight: Tensor, gram: Gram, pattern: Pattern) -> Tensor:
            return solve_live(self.job.method, weight, gram, pattern, options).weight

        return prune

    def forget(self) -> None:
        """Delete the journal and the smaller models."""
        self.journal.clear()
        if self.smaller is not None:
            self.smaller.journal.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def finished(
        self, report: Report, scores: dict[str, Any], timeline: dict[str, Any], seconds: float
    ) -> Report:
        """The report with the metrics, the timeline and the time of the run."""
        return super().finished(report, scores, timeline, seconds + self.spent)

    def change(
        self, store: ModelStore, text: Text, plan: Plan | None, report: Report
    ) -> TaskResult:
        """Round the embedding and the head, then solve each block after the other."""
        assert isinstance(store, Fitted)
        assert store.choice is not None
        assert plan is not None
        if (outer := store.choice.outer) is not None:
            for name in outer.names:
                if name in store.choice.levels:
                    self._round_outer(store, name, outer.matrix(name))
        job = self._job(with_levels(plan, self.form, store.choice.levels))
        options = report.options | record(job.recipe, job.augmentation, None)
        report = prune_model(store, text, job, replace(report, options=options))
        if self.ends is not None:
            report = self._with_norms(store, report, self.ends)
        plan = with_levels(plan, self.form, store.choice.levels)
        structure = {} if self.smaller is None else self.smaller.structure
        fit = self.fit_record(store.choice)
        return TaskResult(replace(report, fit=fit, structure=structure, skipped=plan.dense), plan)

    def fit_record(self, choice: FitChoice) -> dict[str, Any]:
        """The entry of the report, whose losses are above that of the whole model."""
        table, levels = choice.table, choice.levels
        rise, whole = (0.0, table) if (made := self.smaller) is None else (made.rise, made.table)
        fit = {
            "budget": self.budget, "expected": table.size(levels),
            "loss": rise + table.loss(levels), "levels": levels,
            "frontier": [(size, rise + loss) for size, loss in frontier(table)],
            "table": whole.record(),
        }  # fmt: skip
        return fit | ({"candidates": list(self.candidates)} if self.candidates else {})

    def _job(self, plan: Plan) -> Pruning:
        """The loop over blocks; tuning and random tokens are for models with zeros."""
        zeros = any(entry.pattern and not keeps_all(entry.pattern) for entry in plan.sites)
        job = self.job if zeros else fit_job(self.skeleton, self.options, ignore_notice)
        return replace(job, plan=plan)

    def _with_norms(self, store: Fitted, report: Report, ends: float) -> Report:
        """Train the norms and biases until the end of the given time."""
        store.restore()
        structure = {} if self.smaller is None else self.smaller.structure
        minutes = (ends - time.perf_counter() + store.seconds) / 60
        training = norms_after(
            self.options, self.skeleton, self.dense, structure, minutes, self.registry, self.device
        )
        vectors = {name: p for name, p in store.model.named_parameters() if p.ndim == 1}
        for vector in vectors.values() if self.target.is_file else ():
            vector.data = vector.data.float()  # as in the file
        report = train_in_time(training, store, report)
        if report.recovery:
            store.trained = {name: store.model.get_parameter(name).detach() for name in vectors}
        return report

    def _round_outer(self, store: Fitted, name: str, matrix: Tensor) -> None:
        assert store.choice is not None
        grid = self.form.level(name, store.choice.levels[name]).grid
        if grid is None:
            return
        store.status("pruning", f"rounding {name} to {grid.name}")
        weight = store.model.get_parameter(name).data
        store.dense_outer = {**store.dense_outer, name: weight.clone()}
        result = rounded(weight.float(), matrix, grid, store.dtypes.get(name, weight.dtype))
        weight.copy_(result.weight)
        store.keep_rounded(name, None, result)

    def with_output(self, report: Report, store: ModelStore) -> Report:
        """The report with the size of the written output."""
        assert isinstance(store, Fitted)
        return replace(report, fit=report.fit | {"size": store.written_bytes})

    def with_levels(self, block: PlannedBlock, levels: Mapping[str, str]) -> PlannedBlock:
        """A block with the forms of the levels of its sites; see `with_levels`."""
        return block_with_levels(block, self.form, levels)

    def open(self, written: Path) -> Opened:
        """The written file or directory, without weights."""
        if not self.target.is_file:
            return super().open(written)
        return open_skeleton(
            find(str(written), self.registry), self.registry, self.skeleton.spec.name
        )
