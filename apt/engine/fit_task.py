"""The task of ``apt-prune fit``: the best file of a given size."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from apt.checkpoints.exporting import EncodedRows, Export, Exportable, Exported
from apt.checkpoints.load import open_skeleton
from apt.checkpoints.opened import Opened
from apt.checkpoints.stored import local_directory
from apt.distributed.ranks import Ranks
from apt.engine.export import original_file
from apt.engine.file_forms import SMALLER, form_of, smaller_models
from apt.engine.in_file import FitChoice, InFile
from apt.engine.machine import choose_device, read_dtype
from apt.engine.opening import RunRequest, check_export
from apt.engine.prepare import Notice, capped, input_paths, tell_adapter, with_compute
from apt.engine.prune_model import Pruning, prune_model, with_own_text
from apt.engine.prune_task import CalibratedTask, check_memory
from apt.engine.pruning_plan import settings
from apt.engine.recipes import record
from apt.engine.store import ModelStore
from apt.engine.task import TaskResult
from apt.engine.text import Text
from apt.errors import AptError
from apt.files.journal import Journal, Line, journal_beside
from apt.files.writing import check_file
from apt.fit.choice import choose, frontier, smallest_size
from apt.fit.levels import FileForm, Level
from apt.fit.losses import forward_sums, measured_levels, sensitivities
from apt.fit.table import LossTable
from apt.locations.model_source import find
from apt.options import ExportRun, FitRun
from apt.output.report import Report, read_report, report_beside, versions
from apt.patterns import TargetForm, Unstructured
from apt.planning.plan import Plan, PlannedBlock, PlannedSite, make_plan
from apt.plugin.registry import Registry, registry
from apt.plugin.specs import ExportSpec
from apt.solver import rounded

_MEASURE = "leave it out: the losses are then measured"
_MEANS = ("bits", *SMALLER)


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
    """The choice of a level for each tensor under a budget, and the rounding to these levels.

    Attributes:
        export: the format of the file.
        form: what the file can hold.
        model: the model on disk, from which the tensors that keep their values are written.
        budget: the largest size of the file in bytes.
        table: the table of losses of an earlier run, and the hash of the weights of its model;
            None to measure the losses.
        journal: the journal with the table of an interrupted run.
        means: the allowed means, see `apt.options.fit.MEANS`.
        smaller: the smaller model that takes the place of the model; the model on disk is then the
            smaller one, and its weights have changed.
        candidates: the records of the models that were compared, for the report.
        spent: the seconds of the comparison.
    """

    options: FitRun
    export: ExportSpec
    form: FileForm
    model: Exportable
    budget: int
    table: tuple[LossTable, str] | None = None
    journal: Journal = field(default_factory=Journal)
    means: tuple[str, ...] = ("bits",)
    smaller: Smaller | None = None
    candidates: tuple[dict[str, Any], ...] = ()
    spent: float = 0.0
    event = " fitting"

    @property
    def in_place(self) -> bool:
        """False: the values are rounded, even if they come from a quantised checkpoint."""
        return False

    @property
    def writes_file(self) -> bool:
        """True: the output is one file."""
        return True

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
        """The text with generated samples, and the plan with the grid of each site."""
        assert isinstance(store, InFile)
        text = with_own_text(store, text, self.job)
        table = self.losses(store, text)
        store.status("allocation", "measuring the inputs of the head")
        outer = forward_sums(store.model, self.job.adapter, text.tokens, table.gradient)
        levels = choose(table, self.budget)
        store.choice = FitChoice(table, levels, outer)
        return text, with_grids(self.job.plan, self.form, levels)

    def losses(self, store: ModelStore, text: Text) -> LossTable:
        """The table of losses: the given one, that of an interrupted run, or a new one.

        Args:
            text: the text with generated samples.
        """
        if self.table is not None:
            return self._given(store)
        record = self.remembered(
            self.inputs_of_losses(store, text), "table", lambda: self._measured(store, text)
        )
        return LossTable.read(record)

    def _given(self, store: ModelStore) -> LossTable:
        """The table of an earlier run; raises `AptError` if its model had other weights."""
        assert self.table is not None
        table, weights = self.table
        if weights != store.weights:
            message = f"{self.options.table_from} was made from a model with other weights"
            raise AptError(message, _MEASURE, ("table_from",))
        return table

    def inputs_of_losses(self, store: ModelStore, text: Text) -> Line:
        """All inputs of the measured losses, for the journal."""
        sizes = {n: [[x.name, x.size] for x in row] for n, row in self.form.levels.items()}
        return store.shared_inputs(text.tokens) | {"sizes": sizes, "versions": versions()}

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
            return lambda done, total: store.status("allocation", f"{work} {done} of {total}")

        model, adapter, plan = store.model, self.job.adapter, self.job.plan
        given = sensitivities(model, adapter, plan, text.tokens, step("gradients: sample"))
        levels = measured_levels(
            model, adapter, plan, given, self.form.levels, step("losses of the levels: block")
        )
        return LossTable(levels, self.form.rest, given.outer.gradient).record()

    @property
    def folder(self) -> Path:
        """A hidden folder beside the output, for smaller models that are compared."""
        real = self.options.directory.resolve()
        return real.with_name(f".{real.name}.smaller")

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
        """Round the embedding and the head, then each block after the other."""
        assert isinstance(store, InFile)
        assert store.choice is not None
        assert plan is not None
        choice = store.choice
        for name in choice.outer.names:
            if name in choice.levels:
                self._round_outer(store, name, choice)
        report = prune_model(store, text, replace(self.job, plan=plan), report)
        table, levels, whole = choice.table, choice.levels, choice.table
        rise, structure = 0.0, dict[str, Any]()
        if (smaller := self.smaller) is not None:
            rise, structure, whole = smaller.rise, smaller.structure, smaller.table
        fit = {
            "budget": self.budget, "size": table.size(levels), "loss": rise + table.loss(levels),
            "levels": levels,
            "frontier": [(size, rise + loss) for size, loss in frontier(table)],
            "table": whole.record(),
        }  # fmt: skip
        if self.candidates:
            fit["candidates"] = list(self.candidates)
        return TaskResult(replace(report, fit=fit, structure=structure), plan)

    def _round_outer(self, store: InFile, name: str, choice: FitChoice) -> None:
        grid = level_of(self.form, name, choice.levels[name]).grid
        if grid is None:
            return
        store.status("pruning", f"rounding {name} to {grid.name}")
        weight = store.model.get_parameter(name).data
        store.dense_outer = {**store.dense_outer, name: weight.clone()}
        result = rounded(weight.float(), choice.outer.matrix(name), grid)
        weight.copy_(result.weight)
        store.keep_rounded(name, None, result)

    def write_file(self, encoded: Mapping[str, EncodedRows], target: Path) -> Exported:
        """Write the file; other tensors have the values of the model on disk."""
        write: Export = self.export.load()
        return write(self.model.with_encoded(encoded), target)

    def open(self, written: Path) -> Opened:
        """The written file, without weights."""
        source = find(str(written), self.registry)
        return open_skeleton(source, self.registry, self.skeleton.spec.name)


def level_of(form: FileForm, name: str, level: str) -> Level:
    """A level of a tensor, by the names of its parameter and of the level."""
    return next(each for each in form.levels[name] if each.name == level)


def with_grids(plan: Plan, form: FileForm, levels: Mapping[str, str]) -> Plan:
    """The plan with the grid of the chosen level of each site; other sites stay as they are."""

    def changed(block: PlannedBlock, entry: PlannedSite) -> PlannedSite:
        name = f"{block.name}.{entry.site.parameter}"
        grid = level_of(form, name, levels[name]).grid if name in levels else None
        target = None if grid is None else TargetForm(Unstructured(0.0), grid)
        return replace(entry, form=target)

    blocks = (
        replace(block, sites=tuple(changed(block, entry) for entry in block.sites))
        for block in plan.blocks
    )
    return replace(plan, blocks=tuple(blocks))


def read_table(output: Path, form: FileForm) -> tuple[LossTable, str]:
    """The table of losses in the report of an earlier run, and the hash of the model's weights.

    Raises:
        AptError: there is none, or it has other tensors, sizes or levels.
    """
    record, hint = read_report(output) or {}, _MEASURE
    if not record.get("fit"):
        raise AptError(f"{output} has no table of losses", hint, ("table_from",))
    try:
        table = LossTable.read(record["fit"].get("table"))
    except ValueError as error:
        message = f"the report of {output} is damaged: {error}"
        raise AptError(message, hint, ("table_from",)) from error
    sizes = {name: [(x.name, x.size) for x in levels] for name, levels in form.levels.items()}
    if sizes != {name: [(x.name, x.size) for x in row] for name, row in table.tensors.items()}:
        message = f"{output} was made from another model, or for another format"
        raise AptError(message, hint, ("table_from",))
    return replace(table, rest=form.rest), str(record["model"].get("sha256", ""))


def prepare_fit(
    request: RunRequest[FitRun], registry: Registry, notice: Notice, ranks: Ranks
) -> FitTask:
    """Check a run that fits a model into a budget.

    Raises:
        AptError: an option does not fit the model, the machine or the disk, even the smallest file
            is larger than the budget, or there are several processes.
    """
    options, source = request.options, request.source
    output = options.directory
    if ranks.size > 1:  # each rank would have the bytes of the weights that it rounds
        raise AptError("fit runs in one process", "start it without torchrun")
    spec = check_export(ExportRun(model=options.model, output=output), registry, ("output",))
    if spec.form is None:
        raise AptError(f"{spec.name} files have no levels to choose from", options=("output",))
    texts = [options.calibration, options.evaluation, options.tokenizer]
    inputs = input_paths(source, texts)
    for path in (output, report_beside(output)):
        check_file(path, overwrite=options.overwrite, inputs=inputs, options=("output",))
    skeleton = open_skeleton(source, registry, options.adapter, expanded=True)
    if options.adapter is None:
        tell_adapter(skeleton, notice)
    device = choose_device(options.device)
    skeleton = with_compute(skeleton, options, device, notice)
    original = source.files()[0] if source.gguf else original_file(local_directory(skeleton), spec)
    model = Exportable(skeleton, original=original, changed=_was_changed(skeleton))
    spec.examine(model)
    form, means = form_of(spec, model, skeleton), _means(options, spec)
    weights = sum(parameter.numel() for parameter in skeleton.module.parameters())
    budget = options.budget(weights)
    given = options.may is not None
    if (smallest := smallest_size(form)) > budget or given:
        smaller = smaller_models(spec, model, skeleton, means, given=given, smallest=True)
        smallest = min([smallest, *(each.smallest for each in smaller)])
    if smallest > budget:
        raise AptError(
            f"{options.model} does not fit into {budget:,} bytes: its smallest {spec.name} file "
            f"has {smallest:,} ({smallest / 2**20:.1f} MiB)",
            "give a larger size" + ("" if means == _MEANS else f", or allow {', '.join(SMALLER)}"),
            ("size", "bits"),
        )
    options = replace(
        options, adapter=skeleton.spec.name, seqlen=capped(options.seqlen, skeleton, notice)
    )
    task = FitTask(
        options=options, registry=registry, skeleton=skeleton, device=device,
        dtype=read_dtype(options.dtype), job=fit_job(skeleton, options, notice), notice=notice,
        export=spec, form=form, model=model, budget=budget,
        table=read_table(options.table_from, form) if options.table_from is not None else None,
        journal=journal_beside(output, "table", "a fit"), means=means,
    )  # fmt: skip
    check_memory(task)
    return task


def _means(options: FitRun, spec: ExportSpec) -> tuple[str, ...]:
    """The allowed means; raises `AptError` if the format does not have one of them."""
    means = options.means(_MEANS)
    if without := [name for name in means if name not in _MEANS]:
        raise AptError(
            f"{without[0]} do not make a {spec.name} file smaller",
            f"choose from {', '.join(_MEANS)}",
            ("may",),
        )
    return means


def _was_changed(skeleton: Opened) -> bool:
    """True if the weights are no longer those of the file from which the model was made."""
    record = {} if skeleton.source.gguf else read_report(local_directory(skeleton)) or {}
    return any(record.get(entry) for entry in ("sites", "structure", "recovery"))


def smaller_task(task: FitTask, place: Path) -> FitTask:
    """The fit of a smaller model in a directory, in place of the model from which it was made."""
    options, spec = task.options, task.export
    source = find(str(place), task.registry, trust_remote_code=options.trust_remote_code)
    opened = open_skeleton(source, task.registry, task.skeleton.spec.name, expanded=True)
    opened = with_compute(opened, options, task.device, _ignore)
    model = Exportable(opened, original=task.model.original, title=task.model.title, changed=True)
    return replace(
        task, skeleton=opened, model=model, form=form_of(spec, model, opened),
        job=fit_job(opened, options, _ignore), table=None,
        journal=journal_beside(place, "table", "a fit"),
    )  # fmt: skip


def _ignore(line: str) -> None:
    """Ignore a notice."""


def fit_job(skeleton: Opened, options: FitRun, notice: Notice) -> Pruning:
    """The loop over blocks that rounds each site; no weight is removed."""
    spec = registry().default_method()
    epochs, copies = options.tuning_epochs or 0, options.random_tokens or 0
    chosen = replace(options, tuning_epochs=epochs, random_tokens=copies)
    recipe, augmentation = settings(skeleton, chosen, chosen, spec, notice)
    recipe = replace(recipe, permute=False, row_importance=None)
    plan = make_plan(skeleton.module, skeleton.adapter, Unstructured(0.0))
    return Pruning(skeleton.adapter, plan, spec.load(), recipe, augmentation, seed=options.seed)
