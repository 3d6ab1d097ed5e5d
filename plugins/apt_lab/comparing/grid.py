"""The run of a comparison: each cell prunes a copy of one model, and is measured."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from apt import prune_copy
from apt.checkpoints.architecture import quantised_with
from apt.checkpoints.copies import CARD
from apt.checkpoints.load import fingerprint
from apt.checkpoints.masks import masks_of, sparsity_of
from apt.compute import compute_dtype, computing_in, dtype_name
from apt.evaluation import kept_states
from apt.extending import (
    Opened,
    Source,
    check_same_vocabulary,
    choose_device,
    load,
    open_skeleton,
    registry,
)
from apt.files.hashes import file_hashes
from apt.locations.model_source import find
from apt.locations.paths import portable
from apt.locations.text_sources import portable_sources
from apt.modes import default_modes
from apt.options import PruneOptions
from apt.output.report import versions
from apt.text.datasets import digest
from apt_lab.comparing.cells import Cell, read_cells
from apt_lab.comparing.inputs import read_inputs
from apt_lab.comparing.results import DENSE, Comparison, Row
from apt_lab.options import CompareRun, parts
from apt_lab.tasks.harness import answer, task_setting


class Grid:
    """The model and the texts of a comparison, loaded once.

    Args:
        run: the options.
        source: the dense model.
        tasks: the names of tasks, see `apt_lab.tasks.harness.check_tasks`.
        status: called with a text for each step.
        notice: called with a line about a value that was changed.
        progress: True if lm-evaluation-harness may show its progress on standard error.

    Raises:
        AptError: a name is unknown, the model, a text or a directory cannot be read, or a directory
            has a model with another vocabulary.
    """

    def __init__(
        self,
        run: CompareRun,
        source: Source,
        tasks: Sequence[str] = (),
        status: Callable[[str], None] = lambda text: None,
        notice: Callable[[str], None] = lambda text: None,
        *,
        progress: bool = False,
    ) -> None:
        self._run, self._tasks = run, tasks
        self._status, self._progress = status, progress
        self._device = choose_device(run.device)
        cells = read_cells(parts(run.methods, "methods"), parts(run.patterns, "patterns"))
        status("reading text")
        skeleton = open_skeleton(source, registry())
        if tasks:
            skeleton.check_windows("tasks")
        self._inputs = read_inputs(run, skeleton, notice)
        self._work: dict[str, Callable[[], Row]] = {DENSE: self._unpruned}
        self._work |= {cell.key: partial(self._pruned, cell) for cell in cells}
        for path in run.others:
            status(f"reading {path}")
            check_same_vocabulary(_other_skeleton(path), skeleton)
            name = self._name_of(path)
            # The key has a checksum of the files, so that a changed directory is measured again.
            checksum = hashlib.sha256(json.dumps(file_hashes(path, [CARD])).encode()).hexdigest()
            self._work[f"with {name} {checksum[:12]}"] = partial(self._other, name, path)
        status("loading the model")
        self._dense: Opened = load(skeleton, None, self._device)
        self._compute = compute_dtype(self._dense.dtype, self._device, run.compute)
        if not skeleton.reads.windows:
            status("running the dense model")
            with default_modes(), self._computing(self._dense.module):
                self._inputs.complete(self._dense.module)

    def _name_of(self, path: Path) -> str:
        """The name of a directory of another tool; its path if two directories have this name."""
        names = [other.resolve().name for other in self._run.others]
        name = path.resolve().name
        return name if names.count(name) == 1 else str(path)

    def setting(self) -> dict[str, Any]:
        """The common setting of all rows, for the file of the results."""
        run, inputs = self._run, self._inputs
        return {
            "model": portable(run.model),
            "weights": fingerprint(self._dense.module),
            "calibration": portable_sources(run.calibration),
            "tokens": digest(inputs.calibration),
            "shape": list(inputs.calibration.shape),
            **({} if inputs.words is None else {"reads": inputs.words}),
            "seed": run.seed,
            "compute": dtype_name(self._compute),
            "data": {portable(n): digest(each.inputs) for n, each in inputs.measured.items()},
            "windows": {portable(n): list(e.inputs.shape) for n, e in inputs.measured.items()},
            "metrics": list(inputs.metrics),
            **(task_setting(self._tasks, run.limit) if self._tasks else {}),
            "versions": versions(),
        }

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self._work)

    def run(self, comparison: Comparison, tell: Callable[[Row], None]) -> list[Row]:
        """Measure all rows that are not stored yet. Processes with one folder share the work.

        Args:
            comparison: the results; each new row is added to it.
            tell: called with each row, stored or new.

        Returns:
            All rows in order.
        """
        beside_dense = any(spec.dense for spec in self._inputs.metrics.values())
        with kept_states(self._dense.module) if beside_dense else nullcontext():
            waiting = [key for key in self._work if not self._row(comparison, key, tell)]
            for key in waiting:
                self._status(f"waiting for {key}, which another process measures")
                self._row(comparison, key, tell, wait=True)
        return [row for key in self._work if (row := comparison.known(key))]

    def _row(
        self, comparison: Comparison, key: str, tell: Callable[[Row], None], *, wait: bool = False
    ) -> bool:
        """Measure a row if it is not stored; False if another process measures it."""

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
            self._inputs.calibration,
            pattern=cell.pattern,
            adapter=self._dense.spec.name,
            method=cell.method,
            options=PruneOptions(effort=cell.effort, compute=self._run.compute),
            allocation=cell.allocation,
            other_tokens=self._inputs.other_tokens,
            tokenizer=self._inputs.tokenizer,
            seed=self._run.seed,
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
        """The row of a model that another tool pruned."""
        loaded = load(_other_skeleton(path), None, self._device)
        row = {"method": name, "pattern": "", **self._scores(loaded.module)}
        if quantised_with(loaded.config) is None:  # quantised models have no plain weights
            row["sparsity"] = sparsity_of(masks_of(loaded.module, loaded.adapter))
        return row

    @contextmanager
    def _computing(self, module: nn.Module) -> Iterator[None]:
        """While entered, a model and the dense model run in the compute dtype."""
        with ExitStack() as stack:
            for model in (module, self._dense.module):
                if quantised_with(model.config) is None:  # quantised models choose their own dtype
                    stack.enter_context(computing_in(model, self._compute))
            yield

    def _scores(self, module: nn.Module) -> Row:
        """The metrics on each text and on its windows, and the answers to each task."""
        row: Row = {"scores": {}, "windows": {}}
        metrics = self._inputs.metrics
        shared = kept_states(module) if len(metrics) > 1 else nullcontext()
        with self._computing(module), self._dense.adapter.running(module), shared:
            for name, measured in self._inputs.measured.items():
                scores = row["scores"][portable(name)] = {}
                windows = row["windows"][portable(name)] = {}
                for metric, spec in metrics.items():
                    self._status(f"measuring {metric} on {name}")
                    scores[metric], values = measured.score(spec, module, self._dense.module)
                    if values is not None:
                        windows[metric] = values.record()
            if self._tasks:
                self._status("answering tasks")
                answers = answer(
                    module, self._inputs.tokenizer, self._tasks, self._run.limit,
                    progress=self._progress, trust_remote_code=self._run.trust_remote_code,
                )  # fmt: skip
                row["tasks"] = {task.task: task.record() for task in answers}
        return row


def _other_skeleton(path: Path) -> Opened:
    """The model in a directory of another tool, without weights."""
    return open_skeleton(find(str(path.resolve()), registry()), registry(), packed=True)
