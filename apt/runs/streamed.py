"""A run whose model streams from disk to disk: no more of it in memory than one block.

The output begins as a copy of the checkpoint, and what is pruned is written over its own bytes; so
shards, dtypes, metadata and every other file stay as they were. Dense weights are always read from
the input: a block that was cut short is pruned again from the start, with the same result.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from apt.calibration.storage import DiskStore, Store
from apt.checkpoints.copies import check_copy, checksums, copied_size
from apt.checkpoints.offload import StoredBlocks, assemble
from apt.checkpoints.safetensors_io import Shards
from apt.checkpoints.stored import open_stored
from apt.checkpoints.tensor_map import pruned_tensors
from apt.distributed.ranks import Ranks
from apt.errors import AptError, first_line
from apt.evaluation.blockwise import carried
from apt.output.card import write_card
from apt.output.location import check_space
from apt.output.report import Report, versions
from apt.output.workplace import Workplace, writing
from apt.planning.allocation import UNIFORM
from apt.planning.plan import Plan
from apt.runs.disk_blocks import DiskBlocks
from apt.runs.estimate import activations_on_disk
from apt.runs.machine import activation_store
from apt.runs.measures import Unmeasured, measure
from apt.runs.prepare import Prepared
from apt.runs.prune_model import Job
from apt.runs.text import Text
from apt.text.datasets import digest

_PIECE = 2**24


class StreamedRun:
    """See `apt.runs.storage.RunStorage`. A journal says what is done already.

    Args:
        prepared: the checked run.
        status: told what is being done.
        ranks: the processes that do this together. The first keeps the journal and writes.

    Raises:
        AptError: the checkpoint cannot be streamed.
    """

    model: nn.Module
    block_storage: DiskBlocks

    def __init__(self, prepared: Prepared, status: Callable[[str], None], ranks: Ranks) -> None:
        self._prepared, self._status, self._ranks = prepared, status, ranks
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
        self._problems: list[Unmeasured] = []

    def check_space(self) -> None:
        """Hold the size of output and activations against the disk, unless the output is there."""
        if self._ranks.first and not self._prepared.options.resume:
            needed = copied_size(self._stored.directory, self._stored.shards)
            needed += _activations_on_disk(self._prepared)
            check_space(self._prepared.options.output, needed)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """What an error leaves of the output can be resumed from, if a block was done."""
        work = self._work
        with _resumable(work), work.locked() if self._ranks.first else nullcontext():
            yield

    def begin(self, text: Text, report: Report) -> Report:
        """Continue from the journal, or copy the checkpoint; then load what is not in blocks."""
        self._text = text
        self._status("checking and hashing the weights")
        self._stored.check_finite()
        report = replace(report, model=report.model | {"sha256": _hash(self._stored.shards)})
        journal = self._work.journal
        if self._ranks.first:
            self._open(_fingerprint(report, text.held_out, self._ranks))
        journal.lines = self._ranks.share(journal.lines)
        self._assemble()
        return report

    def _open(self, fingerprint: dict[str, Any]) -> None:
        """Continue from what an earlier run left, once that is checked; or copy.

        Raises:
            AptError: the earlier run was another one, or what it left was changed.
        """
        work, fingerprint = self._work, json.loads(json.dumps(fingerprint))
        options = self._prepared.options
        if options.resume:
            work.journal.read()
        if options.resume and work.journal.has("block"):
            work.go_on(fingerprint)
            if not work.appeared():
                self._check_copy()
            return
        work.begin()
        self._status("copying the checkpoint")
        other = self._text.tokenizer if options.tokenizer else None
        self._stored.copy(work.out, other, options.max_shard_size)
        work.journal.add({"fingerprint": fingerprint})
        work.journal.add({"copied": checksums(work.out, headers=True)})

    def _check_copy(self) -> None:
        """Hold what an earlier run left against its checksums."""
        work = self._work
        self._status("checking what the interrupted run left")
        pruned = pruned_tensors(self._prepared.plan, self._stored.layout)
        try:
            copied = dict(next(line["copied"] for line in work.journal.lines if "copied" in line))
            check_copy(self._stored.shards, work.out, copied, pruned)
        except (AptError, OSError, StopIteration, TypeError, ValueError) as error:
            raise work.damaged(getattr(error, "message", first_line(error))) from error

    def _assemble(self) -> None:
        """Load what is not in blocks."""
        if self._work.appeared():
            return
        self._status("loading what is not in blocks")
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
            prepared.plan, *both, prepared.device, self._work, self._ranks
        )
        self.block_storage.check()

    def finished(self) -> Report | None:
        """The report of a run that was cut short when its output had appeared."""
        if not self._work.appeared():
            return None
        report = Report.read(self._work.output)
        if self._ranks.first:
            self._work.finish()
        return report

    def own_text(self, job: Job, tokens: Tensor) -> Tensor:
        """Have the model write it, every block read anew for every token; or as it was written."""
        if not job.augmentation.own_samples:
            return tokens
        if (known := self._known_text()) is None:
            self._status("writing text to calibrate on, block by block")
            with self._dense.read_on_call():
                known = job.with_own_text(self.model, tokens, self._ranks)
            if self._ranks.first:
                save_file({"tokens": known}, self._work.tokens)
                self._work.journal.add({"own_text": digest(known)})
        return known

    def _known_text(self) -> Tensor | None:
        """The tokens that an earlier run wrote; None where it did not.

        Raises:
            AptError: they were changed since.
        """
        sealed = [line["own_text"] for line in self._work.journal.lines if "own_text" in line]
        if not sealed:
            return None
        known = self._ranks.share(self._read_text() if self._ranks.first else None)
        if known is None or digest(known) != sealed[-1]:
            raise self._work.damaged(f"{self._work.tokens.name} was changed")
        return known

    def _read_text(self) -> Tensor | None:
        try:
            return load_file(self._work.tokens)["tokens"]
        except (OSError, KeyError, ValueError, SafetensorError):
            return None

    def measure(self, held_out: Tensor | None, when: str) -> dict[str, Any]:
        """Measure the model with its dense or its pruned blocks, unless that has been done."""
        if held_out is not None and when not in self._scores() and self._ranks.first:
            adapter, on_disk = self._prepared.shell.adapter, self._dense
            on_disk = self._pruned if when == "after" else self._dense
            with carried(self.model, adapter, held_out, on_disk, self.store):
                found = measure(self._prepared, self.model, held_out, when, self._status)
            self._work.journal.add({"scores": {when: found}})
        return self._scores()

    def _scores(self) -> dict[str, Any]:
        """What has been measured, as the journal has it."""
        found: dict[str, Any] = {}
        try:
            for line in self._work.journal.lines:
                found |= line.get("scores", {})
        except (TypeError, ValueError) as error:
            raise self._work.damaged("its journal has no scores") from error
        return found

    def write(self, report: Report, plan: Plan) -> Report:
        """Measure and verify what was written, write the report, and let the output appear."""
        try:
            after = self.measure(self._text.held_out, "after")
        except Exception as error:  # a measure that fails must not lose what it measures
            self._problems.append(Unmeasured(self._prepared.options.output, error))
        else:
            report = replace(report, scores=report.scores | after)
        self._status("verifying")
        self.block_storage.verify()
        report = replace(report, problems=[str(problem) for problem in self._problems])
        report = report.timed(time.perf_counter() - self._started)
        write_card(self._work.out, report, self._stored.directory)
        report = report.write(self._work.out)
        self._work.finish()
        return report

    def measured(self, report: Report) -> Report:
        """Nothing is left to measure.

        Raises:
            Unmeasured: a measure failed.
        """
        if self._problems:
            raise self._problems[0]
        return report


def _fingerprint(report: Report, held_out: Tensor | None, ranks: Ranks) -> dict[str, Any]:
    """All that the result depends on."""
    return {
        "model": report.model,
        "calibration": report.calibration,
        "evaluation": None if held_out is None else digest(held_out),
        "options": {k: v for k, v in report.options.items() if k not in ("overwrite", "resume")},
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "ranks": ranks.size,
    }


def _activations_on_disk(prepared: Prepared) -> int:
    """Bytes of the activations that will be on disk."""
    options, shell = prepared.options, prepared.shell
    if options.activations != "disk":
        return 0
    tokens = prepared.samples * options.seqlen
    return activations_on_disk(shell, prepared.plan, tokens, shell.dtype)


@contextmanager
def _resumable(work: Workplace) -> Iterator[None]:
    """Say, of whatever ends a run early, that it can be resumed, where it can."""
    try:
        with writing(work.name, "mend that, then resume the run", ("resume",)):
            yield
    except AptError as error:
        if work.kept and "resume" not in error.options and "delete" not in error.hint:
            error.add_hint(f"what is done is kept in {work.folder.name}, to be resumed", "resume")
        raise


def check_streamable(prepared: Prepared) -> None:
    """Raise where a run cannot be streamed, before any work is done."""
    options = prepared.options
    open_stored(prepared.shell)
    for given, what in (
        (options.allocation != UNIFORM, "allocation"),
        (options.dtype != "auto", "dtype"),
    ):
        if given:
            raise AptError(
                f"another {what} than the default needs the whole model in memory",
                f"leave out the {what}, or do not stream",
                (what, "stream"),
            )


def _hash(shards: Shards) -> str:
    """SHA-256 over the files of the weights."""
    found = hashlib.sha256()
    for path in shards.files:
        found.update(f"{path.name}\n".encode())
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                found.update(piece)
    return found.hexdigest()
