"""The run of a comparison: each cell prunes a copy of one model, and is measured."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from apt.checkpoints.architecture import quantised_with
from apt.checkpoints.copies import CARD
from apt.checkpoints.load import fingerprint, load, load_tokenizer, open_shell
from apt.checkpoints.masks import masks_of, sparsity_of
from apt.checkpoints.opened import Opened
from apt.engine.api import prune_copy
from apt.engine.prepare import capped
from apt.engine.text import check_same_vocabulary, check_vocabulary
from apt.evaluation import kept_states
from apt.events import Observer
from apt.files.hashes import file_hashes
from apt.locations.model_source import Source, find
from apt.locations.paths import portable
from apt.options import PruneOptions
from apt.output.report import versions
from apt.plugin.registry import Registry
from apt.text.datasets import calibration_tokens, digest, documents, evaluation_tokens
from apt.text.special_tokens import bos_of
from apt_lab.comparing.cells import Cell
from apt_lab.comparing.results import DENSE, Comparison, Row
from apt_lab.tasks.harness import answer, task_setting
from apt_lab.windows import score


@dataclass(frozen=True)
class CompareOptions:
    """What a comparison compares.

    Args:
        source: the dense model.
        cells: the runs.
        others: directories that another tool pruned, which are measured too.
        data: the data sources to measure on, of different file names.
        metrics: the names of the metrics; they may compare with the dense model.
        tasks: the names of tasks, see `apt_lab.tasks.harness.check_tasks`.
        limit: the number of questions of each task; None for all.
        calibration: the data source of the calibration samples.
        samples, seqlen, seed: the number and length of the calibration samples, and the seed. The
            length is at most the number of the model's positions.
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
        options: what is compared.
        registry: the plugins.
        status: called with a text for each step.
        notice: called with a line about a value that was changed.
        observe: called with the events of each run.
        progress: True if lm-evaluation-harness may show its progress on standard error.

    Raises:
        AptError: the model, a text or a directory cannot be read, or a directory has a model of
            another vocabulary.
    """

    def __init__(
        self,
        options: CompareOptions,
        registry: Registry,
        status: Callable[[str], None] = lambda text: None,
        notice: Callable[[str], None] = lambda text: None,
        observe: Observer = lambda event: None,
        *,
        progress: bool = False,
    ) -> None:
        self._options, self._registry = options, registry
        self._status, self._observe, self._progress = status, observe, progress
        self._metrics = {name: registry.evaluators.get(name) for name in options.metrics}
        status("reading text")
        shell = open_shell(options.source, registry)
        self._seqlen = capped(options.seqlen, shell, notice)
        self._tokenizer = load_tokenizer(options.source)
        self._tokens, self._held_out = self._calibration(), self._windows()
        for tokens in (self._tokens, *self._held_out.values()):
            check_vocabulary(tokens, shell.module, options.source.reference)
        self._work: dict[str, Callable[[], Row]] = {DENSE: self._unpruned}
        self._work |= {cell.key: partial(self._pruned, cell) for cell in options.cells}
        for path in options.others:
            status(f"reading {path}")
            check_same_vocabulary(self._other_shell(path), shell)
            name = self._name_of(path)
            # With a checksum of the files, so that a directory that has changed is measured anew.
            found = hashlib.sha256(json.dumps(file_hashes(path, [CARD])).encode()).hexdigest()
            self._work[f"with {name} {found[:12]}"] = partial(self._other, name, path)
        status("loading the model")
        self._dense: Opened = load(shell, None, options.device)

    def _calibration(self) -> Tensor:
        options = self._options
        texts = documents(options.calibration, "calibration", self._registry)
        return calibration_tokens(
            self._tokenizer, texts, options.samples, self._seqlen, options.seed,
            options.calibration, bos_of(self._tokenizer),
        )  # fmt: skip

    def _windows(self) -> dict[str, Tensor]:
        """The token ids (windows, seqlen) of each text."""
        options = self._options
        return {
            name: evaluation_tokens(
                self._tokenizer, documents(name, "evaluation", self._registry),
                options.windows, self._seqlen, name, bos_of(self._tokenizer),
            )
            for name in options.data
        }  # fmt: skip

    def _name_of(self, path: Path) -> str:
        """The name of a directory of another tool; with its path if another one has this name."""
        names = [other.resolve().name for other in self._options.others]
        own = path.resolve().name
        return own if names.count(own) == 1 else str(path)

    def _other_shell(self, path: Path) -> Opened:
        """The model in a directory of another tool, without weights."""
        return open_shell(find(str(path.resolve()), self._registry), self._registry, packed=True)

    def setting(self) -> dict[str, Any]:
        """What all rows have in common, for the file of the results."""
        options = self._options
        return {
            "model": portable(options.source.reference),
            "weights": fingerprint(self._dense.module),
            "calibration": portable(options.calibration),
            "tokens": digest(self._tokens),
            "shape": list(self._tokens.shape),
            "seed": options.seed,
            "data": {portable(name): digest(t) for name, t in self._held_out.items()},
            "windows": {portable(name): list(t.shape) for name, t in self._held_out.items()},
            "metrics": list(options.metrics),
            **(task_setting(options.tasks, options.limit) if options.tasks else {}),
            "versions": versions(),
        }

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self._work)

    def run(self, comparison: Comparison, tell: Callable[[Row], None]) -> list[Row]:
        """Measure all rows that are not known yet. Processes with one folder divide the rows.

        Args:
            comparison: the results; each new row is added to it.
            tell: called with each row, known or new.

        Returns:
            All rows in order.
        """
        beside_dense = any(spec.dense for spec in self._metrics.values())
        with kept_states(self._dense.module) if beside_dense else nullcontext():
            waiting = [key for key in self._work if not self._row(comparison, key, tell)]
            for key in waiting:
                self._status(f"waiting for {key}, which another process measures")
                self._row(comparison, key, tell, wait=True)
        return [row for key in self._work if (row := comparison.known(key))]

    def _row(
        self, comparison: Comparison, key: str, tell: Callable[[Row], None], *, wait: bool = False
    ) -> bool:
        """Measure a row if it is not known; False if another process measures it."""

        def measure() -> Row:
            self._status(f"measuring {key}")
            return self._work[key]()

        row = comparison.remember(key, measure, wait=wait)
        if row is not None:
            tell(row)
        return row is not None

    def _unpruned(self) -> Row:
        return {"method": DENSE, "pattern": "", **self._scores(self._dense.module)}

    def _pruned(self, cell: Cell) -> Row:
        module, report = prune_copy(
            self._dense.module,
            self._tokens,
            pattern=cell.pattern,
            adapter=self._dense.spec.name,
            method=cell.method,
            options=PruneOptions(effort=cell.effort),
            allocation=cell.allocation,
            tokenizer=self._tokenizer,
            seed=self._options.seed,
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

    def _other(self, name: str, path: Path) -> Row:
        """A row for a model that another tool pruned."""
        loaded = load(self._other_shell(path), None, self._options.device)
        row = {"method": name, "pattern": "", **self._scores(loaded.module)}
        if quantised_with(loaded.config) is None:  # others have no plain weights
            row["sparsity"] = sparsity_of(masks_of(loaded.module, loaded.adapter))
        return row

    def _scores(self, module: nn.Module) -> Row:
        """The metrics on each text and on its windows, and the answers to each task."""
        row: Row = {"scores": {}, "windows": {}}
        shared = kept_states(module) if len(self._metrics) > 1 else nullcontext()
        with self._dense.adapter.running(module), shared:
            for name, tokens in self._held_out.items():
                scores = row["scores"][portable(name)] = {}
                windows = row["windows"][portable(name)] = {}
                for metric in self._metrics:
                    self._status(f"measuring {metric} on {name}")
                    spec = self._metrics[metric]
                    scores[metric], each = score(spec, module, tokens, self._dense.module)
                    if each is not None:
                        windows[metric] = each.record()
            if self._options.tasks:
                self._status("answering tasks")
                answers = answer(
                    module, self._tokenizer, self._options.tasks, self._options.limit,
                    progress=self._progress,
                    trust_remote_code=self._options.source.trust_remote_code,
                )  # fmt: skip
                row["tasks"] = {own.task: own.record() for own in answers}
        return row
