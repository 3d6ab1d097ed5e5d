"""The choice between a model and smaller models of it, for the best file of a given size.

1. The table of losses of the whole model predicts the loss of its best file.
2. If that loss is not small, the loss of smaller models is estimated: of the removal by
   `apt.shrinking.proxy`, and of the bits from the table of the whole model.
3. The best of them are made, and measured on calibration text that was held back. Their own tables
   predict the loss of the bits.

The losses of all steps are in nats for each token, above the loss of the whole model, and are kept
in the journal of the task. Made models are kept in a folder beside the output.
"""

import gc
import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from apt.checkpoints.opened import Opened
from apt.distributed.ranks import Ranks
from apt.engine.file_forms import SMALLER, Means, SmallerModel, smaller_models, smaller_sizes
from apt.engine.fit_preparation import smaller_task
from apt.engine.fit_task import FitTask, Smaller
from apt.engine.fitted import Fitted
from apt.engine.opening import RunRequest, resolve_names
from apt.engine.prepare import ignore_notice
from apt.engine.prune_model import with_own_text
from apt.engine.prune_task import PruneTask, prepare_pruning
from apt.engine.task import Task
from apt.engine.text import Text, other_windows
from apt.errors import AptError
from apt.events import Status
from apt.files.journal import Line
from apt.fit.choice import DoesNotFitError, choose, smallest_size
from apt.fit.estimate import estimated_table
from apt.fit.table import LossTable
from apt.options import FitRun, ShrinkRun, SolveOptions
from apt.options.fit import EXPERTS
from apt.output.json_values import json_value
from apt.output.report import Report, read_report
from apt.plugin.registry import registry
from apt.pruning.expert_choice import ExpertChoice
from apt.shrinking.expert_proxy import ExpertProxy
from apt.shrinking.proxy import Proxy
from apt.shrinking.skipping import loss_without
from apt.shrinking.structure_choice import BlockChoice
from apt.text.datasets import digest

_SMALL_LOSS = 0.05
"""The loss of bits in nats below which no smaller model is tried: to remove parts costs more."""

_MADE = 2
"""The number of smaller models that are made."""

_CHOOSING_TOKENS, _EXPERT_TOKENS = 2048, 4096
"""The calibration tokens on which blocks and experts to remove are chosen for an estimate."""


@dataclass
class _Rated:
    """A model with its losses in nats for each token; None if they are not known.

    Attributes:
        model: a smaller model; None for the whole model.
        predicted: the estimated loss of its best file; None if it does not fit.
        measured: the same with the measured rise of the made model, and with its own table.
        rise: the measured rise alone.
    """

    model: SmallerModel | None
    predicted: float | None
    measured: float | None = None
    rise: float = 0.0

    @property
    def loss(self) -> float:
        """The best known loss; infinite if no file fits."""
        known = self.predicted if self.measured is None else self.measured
        return float("inf") if known is None else known

    def record(self, *, chosen: bool) -> dict[str, Any]:
        """The entry of the report."""
        model = self.model
        return {
            "means": "bits" if model is None else ",".join(model.means),
            "share": 1.0 if model is None else model.size.share,
            "kept": {} if model is None else model.numbers,
            "predicted": self.predicted, "measured": self.measured, "chosen": chosen,
        }  # fmt: skip


@dataclass
class _Comparison:
    """The comparison of a model with smaller ones.

    Attributes:
        task: the fit of the whole model.
        change: does a run, and returns its report.
        status: called at each step.
    """

    task: FitTask
    change: Callable[[Task], Report]
    status: Status
    held: Tensor = field(init=False)
    dense_loss: float = field(init=False)
    table: LossTable = field(init=False)
    inputs: Line = field(init=False)

    def best(self) -> FitTask:
        """The fit of the best model."""
        started, task = time.perf_counter(), self.task
        with self._opened(task) as (store, text):
            self.inputs = task.inputs_of_losses(store, text)
            self.table = task.losses(store, text)
            fits = smallest_size(task.form) <= task.budget  # whatever the values are
            whole = _Rated(None, _loss_in(self.table, task.budget) if fits else None)
            if whole.loss <= _SMALL_LOSS:
                return task
            self.held = _held_back(task, text)
            self.dense_loss = self._remembered(
                "held back", lambda: loss_without(store.model, self._adapter, self.held)
            )
            report = replace(task.begin(store, text), scores=self._scores(store, text))
            rated = self._estimated(store, text, whole.loss)
        better = sorted((each for each in rated if each.loss < whole.loss), key=lambda x: x.loss)
        for each in better[:_MADE]:
            self._measure(each)
        tried = [whole, *better[:_MADE]]
        chosen = min(tried, key=lambda each: each.loss)
        records = tuple(each.record(chosen=each is chosen) for each in (whole, *rated))
        task = replace(task, candidates=records)
        if chosen.model is not None:
            place = self._place(chosen.model)
            structure = Report.read(place).structure
            smaller = Smaller(report, structure, chosen.rise, self.table, self.task.journal)
            task = replace(smaller_task(task, place), smaller=smaller, ends=task.ends)
        return replace(task, spent=time.perf_counter() - started)

    @property
    def _adapter(self) -> Any:
        return self.task.job.adapter

    def _remembered(self, key: str, compute: Callable[[], Any]) -> Any:
        return self.task.remembered(self.inputs, key, compute)

    @contextmanager
    def _opened(self, task: FitTask) -> Iterator[tuple[Fitted, Text]]:
        """While entered, the model of a task is in memory, with the text of the task."""
        self.status("reading text")
        text = replace(task, notice=ignore_notice).read_text(
            Ranks()
        )  # the last task tells its notices
        store = task.target.store(task, None, lambda event: None, self.status)
        store.read()
        yield store, with_own_text(store, text, task.job)
        store.restore()
        del store.model
        gc.collect()

    def _scores(self, store: Fitted, text: Text) -> dict[str, Any]:
        """The metrics of the whole model; empty without a text to measure on."""
        if (windows := text.held_out) is None:
            return {}
        metrics, catalog = self.task.options.metrics, self.task.registry.evaluators

        def measure() -> dict[str, float]:
            self.status("measuring before", "measuring the model")
            with store.measurable(windows, "before") as model:
                return {name: catalog.get(name).measure(model, windows) for name in metrics}

        key = f"before {' '.join(metrics)} {digest(windows)}"
        return {"before": self._remembered(key, measure)}

    def _estimated(self, store: Fitted, text: Text, most: float) -> list[_Rated]:
        """The smaller models that fit, with the estimates of their losses.

        The estimates of a row end with a model whose removal alone costs more than the best file
        so far. With both of the means, they also end where a smaller model has a greater loss, and
        no model is estimated of which a part alone costs more than the best file.

        Args:
            most: the loss of the best file of the whole model.
        """
        task = self.task
        rows = smaller_models(
            task.target.smaller_form,
            task.skeleton,
            task.options.means,
            given=task.options.may is not None,
        )
        removal_of = self._removal_of(store, text)
        rated, removals = list[_Rated](), dict[tuple[str, int], float]()
        for row in rows:
            best = float("inf")
            for model in row:
                parts = model.numbers.items()
                if any(part in removals and removals[part] > most for part in parts):
                    break
                if model.smallest > task.budget:
                    continue
                self.status("structure", f"estimating the loss with {model.label}")
                loss, names = self._remembered(
                    f"estimate {model.label}", partial(removal_of, model)
                )
                removal = loss - self.dense_loss
                rated.append(self._rated(model, removal, names))
                if len(parts) == 1:
                    removals |= dict.fromkeys(parts, removal)
                if removal > most or (len(parts) > 1 and rated[-1].loss > best):
                    break
                best = min(best, rated[-1].loss)
                most = min(most, best)
        return rated

    def _rated(self, model: SmallerModel, removal: float, dropped: Collection[str]) -> _Rated:
        """A smaller model with its estimated loss: that of the removal, and that of the bits."""
        names = _names_in_whole(self.task.skeleton, model, dropped)
        bits = _loss_in(estimated_table(self.table, model.form, names), self.task.budget)
        return _Rated(model, None if bits is None else removal + bits)

    def _proxy(self, store: Fitted, text: Text) -> Proxy:
        """The approximations of smaller models."""
        self.status("structure", "reading the inputs of the model")
        task, kinds = self.task, set[str]()
        if "width" in task.options.means:
            with suppress(AptError):  # a family without widths
                kinds.update(*(size.kept for size in smaller_sizes(task.skeleton, "width")))
        return Proxy(
            store.model, self._adapter, text.windows, task.job.recipe.solver, kinds,
            fit_gaps="depth" in task.options.means,
        )  # fmt: skip

    def _expert_proxy(self, store: Fitted, text: Text) -> ExpertProxy:
        """The approximations of models with fewer experts."""
        self.status("structure", "choosing experts")
        choose = cast(ExpertChoice, registry().default_shrink_method("experts").load())
        counts = [
            n for size in smaller_sizes(self.task.skeleton, EXPERTS) for n in size.kept.values()
        ]
        tokens = _first_tokens(text, _EXPERT_TOKENS)
        return ExpertProxy(store.model, self._adapter, tokens, choose, counts)

    def _removal_of(
        self, store: Fitted, text: Text
    ) -> Callable[[SmallerModel], tuple[float, list[str]]]:
        """A function from a model to its loss, and to the names of the blocks that it drops."""
        proxy = cache(lambda: self._proxy(store, text))
        experts = cache(lambda: self._expert_proxy(store, text))
        choice = cast(BlockChoice, registry().default_shrink_method("blocks").load())
        tokens, whole = (
            _first_tokens(text, _CHOOSING_TOKENS),
            len(self._adapter.blocks(store.model)),
        )

        @cache
        def dropped(count: int) -> list[str]:
            return list(choice(store.model, self._adapter, tokens, count)) if count else []

        def removal(model: SmallerModel) -> tuple[float, list[str]]:
            if EXPERTS in model.means:
                return experts().loss(model.size.kept, self.held), []
            names = dropped(whole - model.size.blocks)
            return proxy().loss(model.size.kept, names, self.held), names

        return removal

    def _measure(self, rated: _Rated) -> None:
        """Make a smaller model, and measure it."""
        assert rated.model is not None
        model, task = rated.model, self._shrink_task(rated.model)
        options = json.dumps(json_value(task.record()), sort_keys=True)
        key = f"measured {model.label} {hashlib.sha256(options.encode()).hexdigest()[:16]}"
        place = self._place(model)
        if not _is_made(place, task):
            self.status("structure", f"making the model with {model.label}")
            self.change(task)

        def measure() -> tuple[float, float]:
            small = smaller_task(self.task, place)
            with self._opened(small) as (store, text):
                self.status("structure", f"measuring the model with {model.label}")
                loss = loss_without(store.model, self._adapter, self.held)
                table = small.losses(store, text)
            return loss - self.dense_loss, table.loss(choose(table, small.budget))

        rated.rise, bits = self._remembered(key, measure)
        rated.measured = rated.rise + bits

    def _place(self, model: SmallerModel) -> Path:
        """The directory of a made model."""
        return self.task.folder / model.label

    def _shrink_task(self, model: SmallerModel) -> PruneTask:
        """The run that makes a smaller model.

        It has the model, the text and the device of the fit, and its own defaults for the solver:
        those of a fit are others.
        """
        names = ({each.name for each in run.OPTIONS} for run in (FitRun, ShrinkRun, SolveOptions))
        fit, shrink, solve = names
        given = (fit & shrink) - solve - {"minutes"} | {"compute"}
        values = {name: getattr(self.task.options, name) for name in given}
        size: dict[str, Any] = {"sizes": model.size.kept}
        if "blocks" in model.numbers:
            size["blocks"] = model.size.blocks
        place = {"output": self._place(model), "overwrite": True, "evaluation": None}
        request: RunRequest[Any] = resolve_names(
            ShrinkRun(**values | place | size), registry(), ignore_notice
        )
        return prepare_pruning(request, registry(), ignore_notice, Ranks())


def best_task(task: FitTask, change: Callable[[Task], Report], status: Status) -> FitTask:
    """The fit of a model, or of a smaller model where that is better.

    Args:
        task: the fit of the whole model.
        change: does a run, and returns its report.
        status: called at each step.
    """
    if not any(name in task.options.means and _has_sizes(task, name) for name in SMALLER):
        return task
    return _Comparison(task, change, status).best()


def _has_sizes(task: FitTask, means: Means) -> bool:
    """True if there are smaller models of one of the means."""
    try:
        return bool(smaller_sizes(task.skeleton, means))
    except AptError:
        if task.options.may is not None:
            raise
        return False


def _first_tokens(text: Text, count: int) -> Tensor:
    """The first samples (samples, seqlen), with about this number of tokens."""
    return text.windows[: max(1, count // text.windows.shape[1])]


def _held_back(task: FitTask, text: Text) -> Tensor:
    """Calibration windows that are not among the samples; the last samples if none are left."""
    found = other_windows(task.options, text, task.skeleton, task.registry, 1 / 8)
    return found if len(found) else text.windows[-max(1, len(text.windows) // 8) :]


def _loss_in(table: LossTable, budget: int) -> float | None:
    """The predicted loss of the best file; None if none fits."""
    try:
        return table.loss(choose(table, budget))
    except DoesNotFitError:
        return None


def _names_in_whole(
    opened: Opened, model: SmallerModel, dropped: Collection[str]
) -> dict[str, str]:
    """The name in the whole model of each tensor of a smaller model."""
    names = [name for name, _ in opened.adapter.blocks(opened.module)]
    kept = [name for name in names if name not in dropped]
    found = {name: name for name in model.form.levels}
    for target, origin in zip(names, kept, strict=False):
        prefix = f"{target}."
        inside = (name for name in model.form.levels if name.startswith(prefix))
        found |= {name: f"{origin}.{name.removeprefix(prefix)}" for name in inside}
    return found


def _is_made(place: Path, task: PruneTask) -> bool:
    """True if an interrupted run has made this model."""
    record = read_report(place) if place.is_dir() else None
    return record is not None and record["options"] == json_value(task.record())
