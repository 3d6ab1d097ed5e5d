"""A run that streams the model from disk to disk, with one block in memory at a time.

The output begins as a copy of the checkpoint, and the pruned tensors are written over their own
bytes. So shards, dtypes, metadata and all other files do not change. Dense weights are always read
from the input: an interrupted block is pruned again from the start, with the same result.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from apt.calibration.storage import DiskStore, Store
from apt.checkpoints.copies import check_copy, checksums, copied_size
from apt.checkpoints.load import skeleton
from apt.checkpoints.masks import MASKS, block_masks, write_masks
from apt.checkpoints.model import Model
from apt.checkpoints.offload import StoredBlocks, assemble
from apt.checkpoints.safetensors_io import Shards
from apt.checkpoints.smaller import check_writable, write_smaller
from apt.checkpoints.stored import open_stored, pruned_tensors
from apt.distributed.ranks import Ranks
from apt.engine.disk_blocks import DiskBlocks
from apt.engine.estimate import activations_on_disk
from apt.engine.machine import activation_store
from apt.engine.measures import MeasurementError, measure
from apt.engine.prepare import WITHOUT_EFFECT, Prepared
from apt.engine.prune_model import Job
from apt.engine.text import Text
from apt.errors import AptError, first_line
from apt.evaluation.blockwise import carried, streamed
from apt.output.card import write_card
from apt.output.location import check_space
from apt.output.report import Report, versions
from apt.output.timeline import Timeline
from apt.output.workplace import Workplace, write_errors
from apt.planning.plan import Plan
from apt.planning.structure import Structure, make_structured_plan
from apt.text.datasets import digest

_CHUNK = 2**24


class StreamedRun:
    """A streamed run, see `apt.engine.storage.RunStorage`. A journal records the finished steps.

    Args:
        prepared: the checked run.
        timeline: receives a text for each step.
        ranks: the processes that prune together. Only the first writes the journal and the output.

    Raises:
        AptError: the checkpoint cannot be streamed.
    """

    model: nn.Module
    block_storage: DiskBlocks

    def __init__(self, prepared: Prepared, timeline: Timeline, ranks: Ranks) -> None:
        self._prepared, self._ranks = prepared, ranks
        self._timeline, self._status = timeline, timeline.status
        options = prepared.options
        self._started = time.perf_counter()
        self._stored = open_stored(prepared.shell)
        self._work = Workplace(options.output, options.overwrite)
        self.store: Store = (
            DiskStore(self._work.activations)
            if options.activations == "disk"
            else activation_store(options.activations)
        )
        self._dense: StoredBlocks
        self._pruned: StoredBlocks
        self._text: Text
        self._problems: list[MeasurementError] = []

    def check_space(self) -> None:
        """Raise if the disk has not enough space for output and activations; not on resuming."""
        if self._ranks.first and not self._prepared.options.resume:
            needed = copied_size(self._stored.directory, self._stored.shards)
            needed += _activations_on_disk(self._prepared)
            if self._prepared.structure is not None:  # the smaller model is written beside it
                needed *= 2
            check_space(self._prepared.options.output, needed)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """While entered, the workplace is locked. After an error, finished blocks are kept."""
        work = self._work
        with _offering_resume(work), work.locked() if self._ranks.first else nullcontext():
            yield

    def readable(self) -> AbstractContextManager[None]:
        """While entered, the dense model can run: each block is read for each of its calls."""
        return self._dense.read_on_call()

    def begin(self, text: Text, report: Report) -> Report:
        """Continue from the journal or copy the checkpoint, and load the weights outside blocks."""
        self._text = text
        self._status("checking and hashing the weights")
        self._stored.check_finite()
        report = replace(report, model=report.model | {"sha256": _hash(self._stored.shards)})
        journal = self._work.journal
        if self._ranks.first:
            self._resume_or_copy(_fingerprint(report, text.held_out, self._ranks))
        journal.lines = self._ranks.share(journal.lines)
        self._assemble()
        return report

    def _resume_or_copy(self, fingerprint: dict[str, Any]) -> None:
        """Check the work of an interrupted run, or copy the checkpoint.

        Raises:
            AptError: the interrupted run had other options or inputs, or its files were changed.
        """
        work, options = self._work, self._prepared.options
        if options.resume and work.resume(fingerprint):
            if not self._is_done():
                self._check_copy()
            return
        work.begin(fingerprint)
        self._status("copying the checkpoint")
        other = self._text.tokenizer if options.tokenizer else None
        self._stored.copy(work.out, other, options.max_shard_size)
        work.journal.add({"copied": checksums(work.out)})

    def _check_copy(self) -> None:
        """Compare the files of the interrupted run with their checksums."""
        work = self._work
        self._status("checking the files of the interrupted run")
        pruned = pruned_tensors(_writable(self._prepared), self._stored.layout)
        try:
            copied = dict(work.journal.values("copied")[0])
            check_copy(self._stored.shards, work.out, copied, pruned)
        except (AptError, OSError, IndexError, TypeError, ValueError) as error:
            raise work.journal.damaged(getattr(error, "message", first_line(error))) from error

    def _assemble(self) -> None:
        """Load the weights outside the blocks."""
        if self._is_done():
            return
        self._status("loading the weights outside the blocks")
        prepared, shell, stored = self._prepared, self._prepared.shell, self._stored
        dtype = stored.dtype(shell, prepared.plan)
        parts = (stored.shards, stored.layout)
        self.model = assemble(shell, *parts, prepared.device, dtype)
        blocks = dict(shell.adapter.blocks(self.model))
        self._dense, self._pruned = (
            StoredBlocks(shards, stored.layout, blocks, prepared.device, dtype)
            for shards in (stored.shards, Shards(self._work.out))
        )
        both = (self._dense, self._pruned)
        self.block_storage = DiskBlocks(
            _writable(prepared), *both, prepared.device, self._work.journal, self._ranks
        )
        self.block_storage.check()

    def _is_done(self) -> bool:
        """True if the interrupted run had completed its output."""
        return self._work.published() or self._work.finished()

    def earlier_report(self) -> Report | None:
        """The report of a run that was interrupted after its output was complete."""
        if not self._is_done():
            return None
        work = self._work
        report = Report.read(work.output if work.published() else work.out)
        self._ranks.wait()
        if self._ranks.first:
            work.finish()
        return report

    def own_text(self, job: Job, tokens: Tensor) -> Tensor:
        """Generate calibration text, with every block read again for every token, or reuse it."""
        if not job.augmentation.own_samples:
            return tokens
        if (known := self._saved_text()) is None:
            self._status("generating calibration text, block by block")
            with self._dense.read_on_call():
                known = job.with_own_text(self.model, tokens, self._ranks)
            if self._ranks.first:
                save_file({"tokens": known}, self._work.tokens)
                self._work.journal.add({"own_text": digest(known)})
        return known

    def _saved_text(self) -> Tensor | None:
        """The tokens that the interrupted run generated; None if it generated none.

        Raises:
            AptError: they were changed since then.
        """
        digests = self._work.journal.values("own_text")
        if not digests:
            return None
        known = self._ranks.share(self._read_text() if self._ranks.first else None)
        if known is None or digest(known) != digests[-1]:
            raise self._work.journal.damaged(f"{self._work.tokens.name} was changed")
        return known

    def _read_text(self) -> Tensor | None:
        try:
            return load_file(self._work.tokens)["tokens"]
        except (OSError, KeyError, ValueError, SafetensorError):
            return None

    def remember(self, key: str, compute: Callable[[], Any]) -> Any:
        """A result in the journal; if it is not there yet, compute and record it."""
        return self._work.journal.remember(key, compute)

    def measure(self, held_out: Tensor | None, when: str) -> dict[str, Any]:
        """Measure the model with its dense or pruned blocks, unless the journal has the result."""
        if held_out is not None and when not in self._scores() and self._ranks.first:
            adapter = self._prepared.shell.adapter
            on_disk = self._pruned if when == "after" else self._dense
            with carried(self.model, adapter, held_out, on_disk, self.store):
                found = measure(self._prepared, self.model, held_out, when, self._status)
            self._work.journal.add({"scores": {when: found}})
        return self._scores()

    def _scores(self) -> dict[str, Any]:
        """The metrics in the journal."""
        found: dict[str, Any] = {}
        try:
            for scores in self._work.journal.values("scores"):
                found |= scores
        except (TypeError, ValueError) as error:
            raise self._work.journal.damaged("its journal has no scores") from error
        return found

    def write(self, report: Report, plan: Plan) -> Report:
        """Measure and verify the written model, write the report, and publish the output."""
        small = self._compact(plan) if plan.structured else None
        try:
            after = self._measure_small(small) if small else self._measure_after()
        except Exception as error:  # the pruned model must not be lost by a failed measurement
            self._problems.append(MeasurementError(self._prepared.options.output, error))
        else:
            report = replace(report, scores=report.scores | after)
        if small is None:
            self._status("verifying")
            report = report.with_zeros(self._verify(plan))
        directory = small or self._work.out
        report = replace(report, problems=[problem.record for problem in self._problems])
        report = replace(report, timeline=self._timeline.record())
        report = report.timed(time.perf_counter() - self._started)
        write_card(directory, report, self._stored.directory)
        report = report.write(directory)
        if small is not None:
            self._work.replace_out(small)
        self._work.finish()
        return report

    def _verify(self, plan: Plan) -> dict[str, int]:
        """Check the written blocks, and write their masks on request; returns the zeros by site."""
        found, options = dict[str, Tensor](), self._prepared.options
        adapter = self._prepared.shell.adapter

        def collect(name: str, block: nn.Module) -> None:
            if options.save_masks:
                found.update(block_masks(name, block, adapter))

        zeros = self.block_storage.verify(plan, collect)
        if options.save_masks:
            write_masks(found, self._work.out / MASKS)
        return zeros

    def _compact(self, plan: Plan) -> Path:
        """Write the smaller model beside the blocks with zeros, and check that it opens."""
        self._status("writing the smaller model")
        self.block_storage.verify(plan)
        shell, target = self._prepared.shell, self._work.fresh("small")
        write_smaller(shell, plan, self._pruned, self._stored.layout, self._work.out, target)
        open_stored(self._small_shell(target))
        return target

    def _small_shell(self, directory: Path) -> Model:
        shell = self._prepared.shell
        source = replace(shell.source, location=str(directory))
        return skeleton(source, self._prepared.registry, shell.spec.name)

    def _measure_small(self, directory: Path) -> dict[str, Any]:
        """The metrics of the smaller model, and those in the journal."""
        held_out, prepared = self._text.held_out, self._prepared
        if held_out is None:
            return {}
        with streamed(self._small_shell(directory), held_out, prepared.device) as module:
            found = measure(prepared, module, held_out, "after", self._status)
        return self._scores() | {"after": found}

    def _measure_after(self) -> dict[str, Any]:
        return self.measure(self._text.held_out, "after")

    def with_final_scores(self, report: Report) -> Report:
        """The report itself: `write` has measured the output.

        Raises:
            MeasurementError: a measurement failed.
        """
        if self._problems:
            raise self._problems[0]
        return report


def _writable(prepared: Prepared) -> Plan:
    """The plan with all blocks that may be written: those to drop may not be chosen yet."""
    if prepared.structure is None:
        return prepared.plan
    shell, structure = prepared.shell, Structure(prepared.structure.sizes[0].kept)
    return make_structured_plan(
        shell.module, shell.adapter, shell.config, structure,
        adjusted=prepared.recipe.targets is not None,
    )  # fmt: skip


def _fingerprint(report: Report, held_out: Tensor | None, ranks: Ranks) -> dict[str, Any]:
    """All inputs that the result depends on."""
    return {
        "model": report.model,
        "calibration": report.calibration,
        "evaluation": None if held_out is None else digest(held_out),
        "options": {k: v for k, v in report.options.items() if k not in WITHOUT_EFFECT},
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "ranks": ranks.size,
    }


def _activations_on_disk(prepared: Prepared) -> int:
    """The size in bytes of the activations on disk."""
    options, shell = prepared.options, prepared.shell
    if options.activations != "disk":
        return 0
    tokens = prepared.samples * options.seqlen
    return activations_on_disk(shell, prepared.plan, tokens, shell.dtype)


@contextmanager
def _offering_resume(work: Workplace) -> Iterator[None]:
    """Add a hint to an error that ends a run early, if the run can be resumed."""
    try:
        with write_errors(work.name, "correct that, then resume the run", ("resume",)):
            yield
    except AptError as error:
        mended = "resume" in error.options or "delete" in error.hint
        another = not set(error.options).issubset(WITHOUT_EFFECT)  # another run
        if work.worth_keeping and not (mended or another):
            error.add_hint(f"finished blocks are in {work.folder.name}: resume the run", "resume")
        raise


def check_streamable(prepared: Prepared) -> None:
    """Raise if a run cannot be streamed, before any work is done."""
    options = prepared.options
    stored = open_stored(prepared.shell)
    if prepared.structure is not None:
        check_writable(stored.layout)
        prepared.structure.check_streamable()
    if not prepared.registry.allocations.get(options.allocation).streams:
        raise AptError(
            f"allocation {options.allocation} needs the whole model in memory",
            "choose another one, or do not stream",
            ("allocation", "stream"),
        )
    if options.dtype != "auto":
        raise AptError(
            "another dtype than the default needs the whole model in memory",
            "leave out the dtype, or do not stream",
            ("dtype", "stream"),
        )


def _hash(shards: Shards) -> str:
    """The SHA-256 of the files of the weights."""
    found = hashlib.sha256()
    for path in shards.files:
        found.update(f"{path.name}\n".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                found.update(chunk)
    return found.hexdigest()
