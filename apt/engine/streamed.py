"""A checkpoint whose blocks stay on disk, with one block in memory at a time.

The output begins as a copy of the checkpoint, and each pruned tensor replaces its own bytes. So
shards, dtypes, metadata and all other files do not change. Dense weights are always read from the
input: an interrupted block is pruned again from the start, with the same result.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from apt.adapter import Samples
from apt.adapter.recording import eval_mode
from apt.checkpoints.copies import check_copy, checksums, copied_size
from apt.checkpoints.offload import StoredBlocks, assemble
from apt.checkpoints.safetensors_io import Shards
from apt.checkpoints.smaller import write_smaller
from apt.checkpoints.stored import open_stored, pruned_parameters, pruned_tensors
from apt.checkpoints.verify import zeros_of
from apt.compute import Precision, compute_dtype
from apt.devices import is_accelerator
from apt.distributed.ranks import Ranks
from apt.engine.machine import activation_store
from apt.engine.store import ModelStore
from apt.engine.task import Task, TaskResult
from apt.engine.text import Text
from apt.errors import AptError, first_line
from apt.evaluation.blockwise import carried, streamed
from apt.events import BlockRecord, ExpertsRemoved, ExpertsRouted, SitePruned, Status
from apt.files.journal import Journal, Line
from apt.output.report import read_site
from apt.output.staging import Staging
from apt.planning.plan import Plan
from apt.text.datasets import digest

_CHUNK = 2**24
_TOKENS = "tokens.safetensors"  # the calibration text that the model has generated
_BLOCK, _COPIED, _OWN_TEXT = "block", "copied", "own_text"  # keys of lines of the journal


class Streamed(ModelStore):
    """A checkpoint on disk; blocks are kept in a copy of it, with a line in the journal.

    Raises:
        AptError: the checkpoint cannot be streamed.
    """

    def __init__(
        self,
        task: Task,
        ranks: Ranks | None = None,
        observe: Callable[[Any], None] = lambda event: None,
        status: Status = lambda phase, text="": None,
    ) -> None:
        super().__init__(ranks, observe, status)
        self._task, self._stored = task, open_stored(task.skeleton)
        self.activations = activation_store(task.options.activations)
        stored = self._stored.dtype(task.skeleton, self._plan)
        compute = compute_dtype(stored, task.device, task.options.compute)
        self.precision = Precision(stored, compute)
        self.dtypes, self.repeatable = self._stored.dtypes(self._plan), True
        self._next_names = dict(itertools.pairwise(planned.name for planned in self._plan.blocks))
        self._reads: dict[str, Future[dict[str, Tensor]]] = {}
        self._reader = ThreadPoolExecutor(1) if reads_ahead(task.device) else None
        self._kept_lines: dict[str, Line] = {}
        self._dense_blocks: StoredBlocks
        self._kept_blocks: StoredBlocks
        self._smaller_directory: Path | None = None

    @property
    def _plan(self) -> Plan:
        """The plan with all blocks that may be written."""
        assert self._task.plan is not None
        return self._task.plan

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

    def output_bytes(self) -> int:
        """The bytes of the output."""
        return copied_size(self._stored.directory, self._stored.shards)

    def read(self) -> None:
        """Check the weights. Blocks are read when they are opened."""
        self.status("opening the model", "checking and hashing the weights")
        self._stored.check_finite()

    def begin(self, text: Text, out: Path | None = None, *, resumed: bool = False) -> None:
        """Copy the checkpoint, and load the weights outside the blocks.

        Args:
            out: an empty directory for the copy, in which blocks are kept; None to keep no blocks.
            resumed: True to check the copy of an interrupted run in place of copying.

        Raises:
            AptError: a file of the interrupted run was changed since then.
        """
        if out is not None:
            if self.ranks.first and resumed:
                self._check_copy(out)
            elif self.ranks.first:
                self._copy(out, text)
            self.ranks.wait()
        self.status("opening the model", "loading the weights outside the blocks")
        stored, device = self._stored, self._task.device
        parts = (stored.shards, stored.layout)
        self.model = assemble(self._task.skeleton, *parts, device, self.precision.compute)
        self._dense_blocks = self._blocks(stored.shards)
        self._kept_blocks = self._dense_blocks if out is None else self._blocks(Shards(out))
        self._kept_lines = {
            str(line[_BLOCK]): line for line in self.journal.lines if _BLOCK in line
        }
        for planned in self._plan.blocks:
            line = self._kept_lines.get(planned.name)
            if line is not None and line.get("digest") != self._kept_blocks.digest(planned):
                raise self.journal.damaged(f"{planned.name} was changed")

    def _copy(self, out: Path, text: Text) -> None:
        self.status("opening the model", "copying the checkpoint")
        options = self._task.options
        replacement = text.tokenizer if options.tokenizer else None
        self._stored.copy(out, replacement, options.max_shard_size)
        self.journal.add({_COPIED: checksums(out)}, out)

    def _check_copy(self, out: Path) -> None:
        """Compare the files of the interrupted run with their checksums."""
        self.status("opening the model", "checking the files of the interrupted run")
        pruned = pruned_tensors(self._plan, self._stored.layout)
        try:
            hashes = dict(self.journal.values(_COPIED)[0])
            check_copy(self._stored.shards, out, hashes, pruned)
        except (AptError, OSError, IndexError, TypeError, ValueError) as error:
            raise self.journal.damaged(getattr(error, "message", first_line(error))) from error

    def _blocks(self, shards: Shards) -> StoredBlocks:
        blocks = dict(self._task.skeleton.adapter.blocks(self.model))
        return StoredBlocks(shards, self._stored.layout, blocks, self._task.device, cast=True)

    def readable(self) -> AbstractContextManager[None]:
        """While entered, the dense model can run. Each call of a block reads its weights."""
        return self._dense_blocks.read_on_call()

    def generated(self, generate: Callable[[], Tensor], what: str = "calibration text") -> Tensor:
        """The samples of ``generate``, or the samples of the interrupted run.

        Raises:
            AptError: the samples of the interrupted run were changed.
        """
        digests = self.journal.values(_OWN_TEXT)
        if digests:
            place = self.folder / _TOKENS
            tokens = self.ranks.share(_read_tokens(place) if self.ranks.first else None)
            if tokens is None or digest(tokens) != digests[-1]:
                raise self.journal.damaged(f"{place.name} was changed")
            return tokens
        self.status("generating text", f"generating {what}, block by block")
        with self.readable():
            tokens = self.ranks.share(generate() if self.ranks.first else torch.empty(0))
        if self.ranks.first and self.journal.path is not None:
            save_file({"tokens": tokens}, place := self.folder / _TOKENS)
            self.journal.add({_OWN_TEXT: digest(tokens)}, place)
        return tokens

    @contextmanager
    def open(self, name: str, block: nn.Module) -> Iterator[None]:
        """While entered, the dense block is in memory. At the end it is on the meta device again.

        For a GPU, the next block is read in the meantime.
        """
        future = self._reads.pop(name, None)
        self._reads.clear()  # a dropped block was read ahead, but is not opened
        dense = future.result() if future else self._dense_blocks.read(name)
        next_name = self._next_names.get(name)
        if self._reader is not None and next_name is not None:
            self._reads[next_name] = self._reader.submit(self._dense_blocks.read, next_name)
        with self._dense_blocks.open(name, dense):
            yield

    def kept(self, name: str) -> list[BlockRecord] | None:
        """The records of a block in the journal; None if the block is not kept yet."""
        return (
            records_of(self._kept_lines[name], self.journal) if name in self._kept_lines else None
        )

    def read_kept(self, name: str, block: nn.Module) -> None:
        """Read a kept block from the copy."""
        self._kept_blocks.restore(name)

    def keep(self, name: str, block: nn.Module, done: Sequence[BlockRecord]) -> None:
        """Write the pruned parameters, and then a line in the journal, on the first rank.

        Every rank continues with the stored values, as a resumed run does.
        """
        super().keep(name, block, done)
        if not self.ranks.first:
            return
        planned = next(each for each in self._plan.blocks if each.name == name)
        self._kept_blocks.write(name, pruned_parameters(planned), self._dense_blocks)
        entries = {
            "sites": [asdict(record) for record in done if isinstance(record, SitePruned)],
            "experts": [asdict(record) for record in done if isinstance(record, ExpertsRemoved)],
            "routed": [asdict(record) for record in done if isinstance(record, ExpertsRouted)],
        }
        self.journal.keep({_BLOCK: name, **entries, "digest": self._kept_blocks.digest(planned)})

    def write(self, result: TaskResult, work: Staging, text: Text) -> Path:
        """The directory of the model: the copy, or the directory of a smaller model beside it.

        The smaller model is written from the kept blocks, and then opened as a check.
        """
        if result.plan is None or not result.plan.structured:
            return work.out
        self.status("writing", "writing the smaller model")
        zeros_of(result.plan, self.written)
        skeleton, layout = self._task.skeleton, self._stored.layout
        self._smaller_directory = work.fresh("small")
        blocks = dict(skeleton.adapter.blocks(self.model))
        written = StoredBlocks(Shards(work.out), layout, blocks, self._task.device)
        write_smaller(skeleton, result.plan, written, layout, work.out, self._smaller_directory)
        open_stored(self._task.open(self._smaller_directory))
        return self._smaller_directory

    def written(self, name: str) -> AbstractContextManager[nn.Module]:
        """While entered, a kept block is in memory."""
        return self._kept_blocks.open(name)

    @contextmanager
    def _readable(self, when: str) -> Iterator[nn.Module]:
        """While entered, the model can run: each call of a block reads its weights."""
        model, on_disk, skeleton = self.model, self._dense_blocks, self._task.skeleton
        if self._smaller_directory is not None:
            skeleton = self._task.open(self._smaller_directory)
            stored = open_stored(skeleton)
            parts = (stored.shards, stored.layout)
            model = assemble(skeleton, *parts, self._task.device, self.precision.compute)
            blocks = dict(skeleton.adapter.blocks(model))
            on_disk = StoredBlocks(*parts, blocks, self._task.device, cast=True)
        elif when == "after":
            on_disk = self._kept_blocks
        with eval_mode(model), skeleton.adapter.running(model), on_disk.read_on_call():
            yield model

    @contextmanager
    def measurable(self, held_out: Tensor | Samples, when: str) -> Iterator[nn.Module]:
        """While entered, the model ``"before"`` or ``"after"`` can run on these windows."""
        skeleton, device = self._task.skeleton, self._task.device
        if isinstance(held_out, Samples):
            with self._readable(when) as model:
                yield model
            return
        if self._smaller_directory is not None:
            opened = self._task.open(self._smaller_directory)
            with streamed(opened, held_out, device, self.precision.compute) as module:
                yield module
            return
        on_disk = self._kept_blocks if when == "after" else self._dense_blocks
        with carried(self.model, skeleton.adapter, held_out, on_disk, self.activations):
            yield self.model


def _read_tokens(path: Path) -> Tensor | None:
    """The tokens in a file; None if it cannot be read."""
    try:
        return load_file(path)["tokens"]
    except (OSError, KeyError, ValueError, SafetensorError):
        return None


def reads_ahead(device: str) -> bool:
    """True if the next block is read while the current block is pruned.

    On a CPU this would need memory for a second block and gain little: the kernel reads ahead.
    """
    return is_accelerator(device)


def records_of(line: Line, journal: Journal) -> list[BlockRecord]:
    """The records of a block in a line of a journal.

    Raises:
        AptError: the line is damaged.
    """
    try:
        sites = [read_site(entry) for entry in line.get("sites", ())]
        experts = (_experts_removed(**entry) for entry in line.get("experts", ()))
        routed = (_experts_routed(**entry) for entry in line.get("routed", ()))
        return [*experts, *sites, *routed]
    except (KeyError, TypeError, ValueError) as error:
        raise journal.damaged(first_line(error)) from error


def _experts_removed(
    name: str, experts: list[int], merged: list[tuple[int, int]], **lists: list[Any]
) -> ExpertsRemoved:
    pairs = tuple((first, other) for first, other in merged)
    tuples = {key: tuple(values) for key, values in lists.items()}
    return ExpertsRemoved(name, tuple(experts), pairs, **tuples)


def _experts_routed(
    name: str, tokens: dict[str, list[int]], weights: dict[str, list[float]]
) -> ExpertsRouted:
    return ExpertsRouted(
        name,
        {source: tuple(counts) for source, counts in tokens.items()},
        {source: tuple(sums) for source, sums in weights.items()},
    )
