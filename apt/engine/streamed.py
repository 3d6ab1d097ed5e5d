"""A run that streams the model from disk to disk, with one block in memory at a time.

The output begins as a copy of the checkpoint, and the pruned tensors are written over their own
bytes. So shards, dtypes, metadata and all other files do not change. Dense weights are always read
from the input: an interrupted block is pruned again from the start, with the same result.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from apt.calibration.storage import DiskStore
from apt.checkpoints.copies import check_copy, checksums, copied_size
from apt.checkpoints.masks import MASKS, Orders, block_masks, write_masks
from apt.checkpoints.offload import StoredBlocks, assemble
from apt.checkpoints.safetensors_io import Shards
from apt.checkpoints.smaller import write_smaller
from apt.checkpoints.stored import open_stored, pruned_tensors
from apt.compute import Precision, compute_dtype
from apt.distributed.ranks import Ranks
from apt.engine.disk_blocks import DiskBlocks
from apt.engine.machine import activation_store
from apt.engine.output_store import OutputStore
from apt.engine.task import Changed, Task
from apt.engine.text import Text
from apt.errors import AptError, first_line
from apt.evaluation.blockwise import carried, streamed
from apt.output.report import Report
from apt.output.staging import write_errors
from apt.output.timeline import Timeline
from apt.planning.plan import Plan
from apt.text.datasets import digest

_CHUNK = 2**24


class Streamed(OutputStore):
    """A streamed run, see `apt.engine.output_store.OutputStore`; a journal records its steps.

    Raises:
        AptError: the checkpoint cannot be streamed.
    """

    blocks: DiskBlocks

    def __init__(self, task: Task, timeline: Timeline, ranks: Ranks) -> None:
        super().__init__(task, timeline, ranks)
        self._stored, where = open_stored(task.skeleton), task.options.activations
        on_disk = where == "disk"
        self.activations = DiskStore(self.work.activations) if on_disk else activation_store(where)
        self._dense: StoredBlocks
        self._pruned: StoredBlocks
        self._small: Path | None = None  # the directory of a smaller model

    def _written_bytes(self) -> int:
        return copied_size(self._stored.directory, self._stored.shards)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """While entered, the staging folder is locked. After an error, finished blocks are kept."""
        resume = "correct that, then resume the run", ("resume",)
        with write_errors(self.work.name, *resume), super().opened():
            yield

    @cached_property
    def weights(self) -> str:
        """The SHA-256 of the files of the weights."""
        digest = hashlib.sha256()
        for path in self._stored.shards.files:
            digest.update(f"{path.name}\n".encode())
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
        return digest.hexdigest()

    def readable(self) -> AbstractContextManager[None]:
        """While entered, the dense model can run: each block is read for each of its calls."""
        return self._dense.read_on_call()

    def begin(self, text: Text) -> Report:
        """Continue from the journal or copy the checkpoint, and load the weights outside blocks."""
        self.text = text
        self.status("opening the model", "checking and hashing the weights")
        self._stored.check_finite()
        stored = self._stored.dtype(self.task.skeleton, self.task.plan)
        compute = compute_dtype(stored, self.task.device, self.task.options.compute)
        self.precision = Precision(stored, compute)
        report = self.task.begin(self, text)
        if self.ranks.first:
            if not self._continues(report):
                self._copy()
            elif not self.is_done():
                self._check_copy()
        self.journal.lines = self.ranks.share(self.journal.lines)
        self._read_scores()
        if not self.is_done():
            self._assemble()
        return report

    def _copy(self) -> None:
        self.status("opening the model", "copying the checkpoint")
        options, out = self.task.options, self.work.out
        other = self.text.tokenizer if options.tokenizer else None
        self._stored.copy(out, other, options.max_shard_size)
        self.journal.add({"copied": checksums(out)}, out)

    def _check_copy(self) -> None:
        """Compare the files of the interrupted run with their checksums."""
        self.status("opening the model", "checking the files of the interrupted run")
        pruned = pruned_tensors(self._plan, self._stored.layout)
        try:
            copied = dict(self.journal.values("copied")[0])
            check_copy(self._stored.shards, self.work.out, copied, pruned)
        except (AptError, OSError, IndexError, TypeError, ValueError) as error:
            raise self.journal.damaged(getattr(error, "message", first_line(error))) from error

    @property
    def _plan(self) -> Plan:
        """The plan with all blocks that may be written."""
        assert self.task.plan is not None
        return self.task.plan

    def _read_scores(self) -> None:
        """Take the metrics from the journal."""
        try:
            for scores in self.journal.values("scores"):
                self._scores |= scores
        except (TypeError, ValueError) as error:
            raise self.journal.damaged("its journal has no scores") from error

    def _assemble(self) -> None:
        """Load the weights outside the blocks."""
        self.status("opening the model", "loading the weights outside the blocks")
        task, stored = self.task, self._stored
        self.model = assemble(
            task.skeleton, stored.shards, stored.layout, task.device, self.precision.compute
        )
        blocks = dict(task.skeleton.adapter.blocks(self.model))
        self._dense, self._pruned = (
            StoredBlocks(shards, stored.layout, blocks, task.device, cast=True)
            for shards in (stored.shards, Shards(self.work.out))
        )
        both = (self._dense, self._pruned)
        self.blocks = DiskBlocks(self._plan, *both, task.device, self.journal, self.ranks)
        self.blocks.check()

    def generated(self, generate: Callable[[], Tensor]) -> Tensor:
        """The samples that ``generate`` returns, or those of the interrupted run.

        Raises:
            AptError: they were changed since then.
        """
        place, digests = self.work.tokens, self.journal.values("own_text")
        if digests:
            known = self.ranks.share(_tokens_in(place) if self.ranks.first else None)
            if known is None or digest(known) != digests[-1]:
                raise self.journal.damaged(f"{place.name} was changed")
            return known
        self.status("generating text", "generating calibration text, block by block")
        with self.readable():
            known = self.ranks.share(generate() if self.ranks.first else torch.empty(0))
        if self.ranks.first:
            save_file({"tokens": known}, place)
            self.journal.add({"own_text": digest(known)}, place)
        return known

    def measure(self, when: str) -> None:
        """Measure the model, unless the interrupted run has done that, and record the result."""
        if when not in self._scores:
            super().measure(when)
            if when in self._scores:
                self.journal.add({"scores": {when: self._scores[when]}})

    @contextmanager
    def _measurable(self, held_out: Tensor, when: str) -> Iterator[nn.Module]:
        adapter = self.task.skeleton.adapter
        if self._small is not None:
            small, compute = self._saved(self._small), self.precision.compute
            with streamed(small, held_out, self.task.device, compute) as module:
                yield module
            return
        on_disk = self._pruned if when == "after" else self._dense
        with carried(self.model, adapter, held_out, on_disk, self.activations):
            yield self.model

    def write(self, changed: Changed) -> Report:
        """Measure and verify the written model, write the report, and publish the output."""
        assert changed.plan is not None
        report = changed.report
        if changed.plan.structured:
            self._small = self._compact(changed.plan)
        self._measure_after()
        if self._small is None:
            self.status("writing", "verifying")
            orders = report.orders if changed.save_masks else None
            report = report.with_zeros(self._verify(changed.plan, orders))
        report = self._record(report, self._small or self.work.out)
        if self._small is not None:
            self.work.replace_out(self._small)
        self._publish()
        return report

    def _verify(self, plan: Plan, orders: Orders | None) -> dict[str, int]:
        """Check the written blocks; returns the zeros by site.

        Args:
            plan: the plan.
            orders: writes the masks, with these orders, see `write_masks`. None writes none.
        """
        written, adapter = dict[str, Tensor](), self.task.skeleton.adapter

        def collect(name: str, block: nn.Module) -> None:
            if orders is not None:
                written.update(block_masks(name, block, adapter))

        zeros = self.blocks.verify(plan, collect)
        if orders is not None:
            write_masks(written, self.work.out / MASKS, orders)
        return zeros

    def _compact(self, plan: Plan) -> Path:
        """Write the smaller model beside the blocks with zeros, and check that it opens."""
        self.status("writing", "writing the smaller model")
        self.blocks.verify(plan)
        skeleton, target = self.task.skeleton, self.work.fresh("small")
        written = StoredBlocks(
            Shards(self.work.out), self._stored.layout,
            dict(skeleton.adapter.blocks(self.model)), self.task.device,
        )  # fmt: skip
        write_smaller(skeleton, plan, written, self._stored.layout, self.work.out, target)
        open_stored(self._saved(target))
        return target


def _tokens_in(path: Path) -> Tensor | None:
    """The tokens in a file; None if it cannot be read."""
    try:
        return load_file(path)["tokens"]
    except (OSError, KeyError, ValueError, SafetensorError):
        return None
