"""The run of a comparison: each cell prunes a copy of one model, and is measured."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from apt.checkpoints.architecture import quantised_with
from apt.checkpoints.load import fingerprint, load, load_tokenizer, skeleton
from apt.checkpoints.masks import masks_of, sparsity_of
from apt.checkpoints.model import Model
from apt.comparing.cells import Cell
from apt.comparing.claims import claimed
from apt.comparing.results import Comparison, Row
from apt.evaluation import kept_states
from apt.evaluation.windows import Windows
from apt.events import Observer
from apt.locations.model_source import Source, find
from apt.output.report import portable, versions
from apt.plugin.registry import Registry
from apt.runs.api import prune_copy
from apt.runs.prune_options import PruneOptions
from apt.runs.text import check_vocabulary
from apt.tasks.harness import answer, task_setting
from apt.text.datasets import calibration_tokens, digest, documents, evaluation_tokens
from apt.text.special_tokens import bos_of


@dataclass(frozen=True)
class Wish:
    """What a comparison compares.

    Args:
        source: the dense model.
        cells: the runs.
        others: directories that something else pruned, which are measured too.
        data: the data sources to measure on.
        metrics: the names of the metrics; they may compare with the dense model.
        tasks: the names of tasks, see `apt.tasks.harness.check_tasks`.
        limit: the number of questions of each task; None for all.
        calibration: the data source of the calibration samples.
        samples, seqlen, seed: the number and length of the calibration samples, and the seed.
        windows: the number of windows of each text to measure on; None for all.
        device: the device.
    """

    source: Source
    cells: Sequence[Cell]
    others: Sequence[Path] = ()
    data: Sequence[str] = ("builtin",)
    metrics: Sequence[str] = ("perplexity",)
    tasks: Sequence[str] = ()
    limit: int | None = None
    calibration: str = "builtin"
    samples: int = 128
    seqlen: int = 2048
    seed: int = 0
    windows: int | None = None
    device: str = "cpu"


class Grid:
    """The model and the texts of a comparison, loaded once.

    Args:
        wish: what is compared.
        registry: the plugins.
        status: called with a text for each step.
        observe: called with the events of each run.
        progress: True if lm-evaluation-harness may show its progress on standard error.

    Raises:
        AptError: the model, a text or a directory cannot be read.
    """

    def __init__(
        self,
        wish: Wish,
        registry: Registry,
        status: Callable[[str], None] = lambda text: None,
        observe: Observer = lambda event: None,
        *,
        progress: bool = False,
    ) -> None:
        self._wish, self._registry = wish, registry
        self._status, self._observe, self._progress = status, observe, progress
        status("reading text")
        self._tokenizer = load_tokenizer(wish.source)
        bos = bos_of(self._tokenizer)
        texts = documents(wish.calibration, "calibration", registry)
        self._tokens = calibration_tokens(
            self._tokenizer, texts, wish.samples, wish.seqlen, wish.seed, wish.calibration, bos
        )
        self._held_out: dict[str, Tensor] = {
            name: evaluation_tokens(
                self._tokenizer, documents(name, "evaluation", registry), wish.windows, wish.seqlen,
                name, bos,
            )
            for name in wish.data
        }  # fmt: skip
        status("loading the model")
        self._dense: Model = load(skeleton(wish.source, registry), None, wish.device)
        for tokens in (self._tokens, *self._held_out.values()):
            check_vocabulary(tokens, self._dense.module, wish.source.reference)

    def setting(self) -> dict[str, Any]:
        """What all rows have in common, for the file of the results."""
        wish = self._wish
        return {
            "model": portable(wish.source.reference),
            "weights": fingerprint(self._dense.module),
            "calibration": portable(wish.calibration),
            "tokens": digest(self._tokens),
            "shape": list(self._tokens.shape),
            "seed": wish.seed,
            "data": {portable(name): digest(t) for name, t in self._held_out.items()},
            "windows": {portable(name): list(t.shape) for name, t in self._held_out.items()},
            "metrics": list(wish.metrics),
            **(task_setting(wish.tasks, wish.limit) if wish.tasks else {}),
            "versions": versions(),
        }

    @property
    def rows(self) -> int:
        """The number of rows."""
        return 1 + len(self._wish.cells) + len(self._wish.others)

    def run(self, comparison: Comparison, tell: Callable[[Row], None]) -> list[Row]:
        """Measure all rows that are not known yet. Processes with one folder divide the rows.

        Args:
            comparison: the results; each new row is added to it.
            tell: called with each row, known or new.

        Returns:
            All rows in order.
        """
        work = dict(self._work())
        with self._shared(self._dense.module):
            waiting = [key for key in work if not self._row(comparison, key, work[key], tell)]
            for key in waiting:
                self._status(f"waiting for {key}, which another process measures")
                self._row(comparison, key, work[key], tell, wait=True)
        return [row for key in work if (row := comparison.known(key))]

    def _row(
        self,
        comparison: Comparison,
        key: str,
        measure: Callable[[], Row],
        tell: Callable[[Row], None],
        *,
        wait: bool = False,
    ) -> bool:
        """Measure a row if it is not known; False if another process measures it."""
        with claimed(comparison.folder, key, wait=wait) as mine:
            comparison.read()
            if (row := comparison.known(key)) is None:
                if not mine:
                    return False
                self._status(f"measuring {key}")
                row = {"key": key, **measure()}
                comparison.add(row)
        tell(row)
        return True

    def _work(self) -> Iterable[tuple[str, Callable[[], Row]]]:
        """The key of each row, and the function that measures it."""
        yield "dense", self._unpruned
        for cell in self._wish.cells:
            yield cell.key, partial(self._pruned, cell)
        for path in self._wish.others:
            yield str(path), partial(self._other, path)

    def _unpruned(self) -> Row:
        return {"method": "dense", "pattern": "", **self._scores(self._dense.module)}

    def _pruned(self, cell: Cell) -> Row:
        module, report = prune_copy(
            self._dense.module,
            self._tokens,
            pattern=cell.pattern,
            adapter=self._dense.spec.name,
            method=cell.method,
            options=PruneOptions(effort=cell.effort),  # type: ignore[arg-type]
            allocation=cell.allocation,
            tokenizer=self._tokenizer,
            seed=self._wish.seed,
            observe=self._observe,
        )
        return {
            "method": cell.label,
            "pattern": cell.pattern,
            "sparsity": report.sparsity,
            "error": report.relative_layer_error,
            "seconds": report.seconds,
            **self._scores(module),
        }

    def _other(self, path: Path) -> Row:
        """A row for a directory that something else pruned."""
        loaded = load(
            skeleton(find(str(path.resolve()), self._registry), self._registry, packed=True),
            None,
            self._wish.device,
        )
        check_vocabulary(self._tokens, loaded.module, str(path))
        row = {"method": path.name, "pattern": "", **self._scores(loaded.module)}
        if quantised_with(loaded.config) is None:  # others have no plain weights
            row["sparsity"] = sparsity_of(masks_of(loaded.module, loaded.adapter))
        return row

    def _shared(self, module: nn.Module) -> AbstractContextManager[None]:
        """While entered, several metrics share the states of a model."""
        return kept_states(module) if len(self._wish.metrics) > 1 else nullcontext()

    def _scores(self, module: nn.Module) -> Row:
        """The metrics on each text and on its windows, and the answers to each task."""
        row: Row = {"scores": {}, "windows": {}}
        with self._dense.adapter.running(module), self._shared(module):
            for name, tokens in self._held_out.items():
                scores = row["scores"][portable(name)] = {}
                windows = row["windows"][portable(name)] = {}
                for metric in self._wish.metrics:
                    self._status(f"measuring {metric} on {name}")
                    scores[metric], each = self._measured(metric, module, tokens)
                    if each is not None:
                        windows[metric] = each.record()
            if self._wish.tasks:
                self._status("answering tasks")
                answers = answer(
                    module, self._tokenizer, self._wish.tasks, self._wish.limit,
                    progress=self._progress,
                )  # fmt: skip
                row["tasks"] = {own.task: own.record() for own in answers}
        return row

    def _measured(
        self, name: str, module: nn.Module, tokens: Tensor
    ) -> tuple[float, Windows | None]:
        """A metric of tokens (windows, seqlen), and of each window if it is a mean of windows."""
        spec = self._registry.evaluators.get(name)
        target, beside = spec.load(), [self._dense.module] if spec.dense else []

        def metric(some: Tensor) -> float:
            return float(target(module, some, *beside))

        if spec.mean is None:
            return metric(tokens), None
        each = Windows.measure(metric, tokens, spec.mean)
        return each.value, each
