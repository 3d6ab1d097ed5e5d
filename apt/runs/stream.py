"""Pruning a checkpoint on disk block by block: no more of a model in memory than one block.

The output begins as a copy of the checkpoint, and what is pruned is written over its own bytes; so
shards, dtypes, metadata and every other file stay as they were. Dense weights are always read from
the input: a block that was cut short is pruned again from the start, with the same result.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from apt.calibration.storage import DiskStore, MemoryStore, Store
from apt.checkpoints.copies import check_copy, checksums, copied_size
from apt.checkpoints.load import load_tokenizer
from apt.checkpoints.offload import Shelf, assemble
from apt.checkpoints.safetensors_io import Shards
from apt.checkpoints.stored import Stored, open_stored
from apt.checkpoints.tensor_map import pruned_tensors
from apt.distributed.ranks import Ranks
from apt.errors import AptError, first_line
from apt.evaluation.blockwise import carried
from apt.events import Observer, SitePruned, telling
from apt.output.card import write_card
from apt.output.location import check_space
from apt.output.report import Report, versions
from apt.output.workplace import Workplace, writing
from apt.planning.allocation import UNIFORM
from apt.pruning.pipeline import prune_blocks
from apt.runs.disk_blocks import OnDisk, sites_of
from apt.runs.estimate import activations_on_disk
from apt.runs.prepare import Prepared
from apt.runs.steps import (
    Unmeasured,
    check_vocabulary,
    chosen_bos,
    measure,
    scored,
    sparing,
    texts,
    unfinished,
)
from apt.text.datasets import digest

_PIECE = 2**24


def execute_streamed(
    prepared: Prepared,
    observe: Observer,
    status: Callable[[str], None],
    *,
    resume: bool,
    ranks: Ranks | None = None,
) -> Report:
    """Prune block by block from disk to disk; see `apt.runs.run.execute`.

    Args:
        prepared: the checked run.
        observe: called with the pipeline's events.
        status: told what is being done outside the pipeline.
        resume: go on with an interrupted run of the same command.
        ranks: the processes that do this together. The first keeps the journal and writes; all
            read, so that the output lies where every one of them can read it.

    Raises:
        AptError: the checkpoint cannot be streamed, or it, the text or the disk is at fault.
    """
    started, options, ranks = time.perf_counter(), prepared.options, ranks or Ranks()
    stored = open_stored(prepared.shell)
    work = Workplace(options.output, options.overwrite)
    if ranks.first and not resume:
        needed = copied_size(stored.directory, stored.shards) + _shelved(prepared)
        check_space(options.output, needed)
    status("reading text")
    tokenizer = load_tokenizer(prepared.shell.source, options.tokenizer)
    prepared, bos = sparing(prepared, tokenizer), chosen_bos(options, tokenizer)
    tokens, held_out = texts(prepared, tokenizer)
    status("checking and hashing the weights")
    stored.check_finite()
    report = unfinished(prepared, tokens, _hash(stored.shards), bos)
    run = _Run(prepared, stored, work, ranks, status)
    with _resumable(work), work.locked() if ranks.first else nullcontext():
        if ranks.first:
            other = tokenizer if options.tokenizer else None
            run.begin(_fingerprint(report, held_out, ranks), resume, other)
        work.journal.lines = ranks.share(work.journal.lines)
        report = replace(
            report,
            sites=run.sites(tokens, held_out, observe),
            scores=scored(prepared, held_out, run.scores()),
            problems=[str(problem) for problem in run.problems],
            seconds=time.perf_counter() - started,
            ranks=ranks.gather(ranks.work),
        )
        if ranks.first:
            run.finish(report)
    if run.problems:
        raise run.problems[0]
    return report


@dataclass
class _Run:
    """The blocks' part of a streamed run, of which the journal knows what is done."""

    prepared: Prepared
    stored: Stored
    work: Workplace
    ranks: Ranks
    status: Callable[[str], None]
    problems: list[Unmeasured] = field(default_factory=list)

    def begin(self, fingerprint: dict[str, Any], resume: bool, tokenizer: Any) -> None:
        """Go on with what an earlier run left, once it is held against what that wrote; or copy.

        Raises:
            AptError: the earlier run was another one, or what it left was changed.
        """
        work, fingerprint = self.work, json.loads(json.dumps(fingerprint))
        if resume:
            work.journal.read()
        if not (resume and work.journal.has("block")):
            work.begin()
            self.status("copying the checkpoint")
            self.stored.copy(work.out, tokenizer, self.prepared.options.max_shard_size)
            work.journal.add({"fingerprint": fingerprint})
            work.journal.add({"copied": checksums(work.out, headers=True)})
            return
        work.go_on(fingerprint)
        if work.appeared():
            return
        self.status("checking what the interrupted run left")
        pruned = pruned_tensors(self.prepared.plan, self.stored.layout)
        try:
            copied = dict(next(line["copied"] for line in work.journal.lines if "copied" in line))
            check_copy(self.stored.shards, work.out, copied, pruned)
        except (AptError, OSError, StopIteration, TypeError, ValueError) as error:
            raise work.damaged(getattr(error, "message", first_line(error))) from error

    def sites(self, tokens: Tensor, held_out: Tensor | None, observe: Observer) -> list[SitePruned]:
        """Prune, measure before and after, and verify what is left to do of that."""
        if self.work.journal.has("finished") and self.work.appeared():
            return [site for line in self.work.journal.lines for site in sites_of(line)]
        prepared, shell = self.prepared, self.prepared.shell
        self.status("loading what is not in blocks")
        parts = (self.stored.shards, self.stored.layout)
        dtype = self.stored.dtype(shell, prepared.plan)
        module = assemble(shell, *parts, prepared.device, dtype)
        check_vocabulary(tokens, module, shell.source.reference)
        blocks = dict(shell.adapter.blocks(module))
        dense, pruned = (
            Shelf(shards, self.stored.layout, blocks, prepared.device, dtype)
            for shards in (self.stored.shards, Shards(self.work.out))
        )
        on_disk = prepared.options.activations == "disk"
        store = DiskStore(self.work.activations) if on_disk else MemoryStore()
        disk = OnDisk(prepared.plan, dense, pruned, prepared.device, self.work, self.ranks)
        disk.check()
        self.score(module, held_out, dense, store, "before")
        sites = prune_blocks(
            module,
            shell.adapter,
            prepared.plan,
            tokens,
            prepared.method.load(),
            **vars(prepared.mode),
            resident=disk,
            store=store,
            ranks=self.ranks,
            observe=telling(observe, prepared.registry.site_pruned),
        )
        try:
            self.score(module, held_out, pruned, store, "after")
        except Exception as error:  # a measure that fails must not lose what it measures
            self.problems.append(Unmeasured(prepared.options.output, error))
        if self.ranks.first:
            self.status("verifying")
            disk.verify()
        return sites

    def score(
        self, module: nn.Module, held_out: Tensor | None, shelf: Shelf, store: Store, when: str
    ) -> None:
        """Measure the model with the blocks of ``shelf``, unless that has been done."""
        if held_out is None or when in self.scores() or not self.ranks.first:
            return
        adapter = self.prepared.shell.adapter
        with carried(module, adapter, held_out, shelf, store):
            found = measure(self.prepared, module, held_out, when, self.status)
        self.work.journal.add({"scores": {when: found}})

    def scores(self) -> dict[str, Any]:
        """What has been measured, as the journal has it."""
        found: dict[str, Any] = {}
        try:
            for line in self.work.journal.lines:
                found |= line.get("scores", {})
        except (TypeError, ValueError) as error:
            raise self.work.damaged("its journal has no scores") from error
        return found

    def finish(self, report: Report) -> None:
        """Write the report, and let the output appear."""
        if not self.work.appeared():
            write_card(self.work.out, report, self.stored.directory)
            report.write(self.work.out)
        self.work.finish()


def _fingerprint(report: Report, held_out: Tensor | None, ranks: Ranks) -> dict[str, Any]:
    """All that the result depends on."""
    return {
        "model": report.model,
        "calibration": report.tokens,
        "evaluation": None if held_out is None else digest(held_out),
        "options": {k: v for k, v in report.options.items() if k not in ("overwrite", "resume")},
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "ranks": ranks.size,
    }


def _shelved(prepared: Prepared) -> int:
    """Bytes of the activations that will be on disk."""
    options, shell = prepared.options, prepared.shell
    if options.activations != "disk":
        return 0
    samples, replaced = options.samples, prepared.mode.replaced
    if replaced is not None:
        samples += replaced.samples(samples, options.seqlen)
    tokens = samples * options.seqlen
    return activations_on_disk(shell, prepared.plan, tokens, shell.dtype)


@contextmanager
def _resumable(work: Workplace) -> Iterator[None]:
    """Say, of whatever ends a run early, that it can be gone on with, where it can."""
    try:
        with writing(work.name, "mend that, then give the same command with --resume"):
            yield
    except AptError as error:
        if work.kept and not any(word in error.hint for word in ("--resume", "delete")):
            error.add_hint(f"what is done is kept in {work.folder.name}, for --resume")
        raise


def check_streamable(prepared: Prepared) -> None:
    """Raise where a run cannot be streamed, before any work is done."""
    options = prepared.options
    open_stored(prepared.shell)
    for given, what in (
        (options.allocation != UNIFORM, "--allocation"),
        (options.dtype != "auto", "--dtype"),
        (bool(options.own_samples), "--own-samples"),
    ):
        if given:
            raise AptError(f"{what} needs the whole model in memory", "leave out --stream or it")


def _hash(shards: Shards) -> str:
    """SHA-256 over the files of the weights."""
    found = hashlib.sha256()
    for path in shards.files:
        found.update(f"{path.name}\n".encode())
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                found.update(piece)
    return found.hexdigest()
