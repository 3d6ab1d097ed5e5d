"""Pruning a checkpoint on disk block by block: no more of a model in memory than one block.

The output begins as a copy of the checkpoint, and what is pruned is written over its own bytes; so
shards, dtypes, metadata and every other file stay as they were. Dense weights are always read from
the input: a block that was cut short is pruned again from the start, with the same result.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt.activations import DiskStore, MemoryStore, Store
from apt.allocate import UNIFORM
from apt.carried import carried
from apt.checkpoint import check_space, open_up
from apt.disk import OnDisk, sites_of
from apt.errors import AptError, first_line
from apt.estimate import activations_on_disk
from apt.events import Observer, SitePruned, telling
from apt.hollow import Shelf, assemble, check_hollow, directory
from apt.journal import Workplace
from apt.layout import layout_of
from apt.models import load_tokenizer
from apt.pipeline import prune_blocks
from apt.ranks import Ranks
from apt.report import FILE, Report, versions
from apt.run import (
    Prepared,
    check_vocabulary,
    chosen_bos,
    measure,
    scored,
    sparing,
    texts,
    unfinished,
)
from apt.shards import Shards
from apt.text import digest

# Weights in other formats would be dense ones beside the pruned.
_LEFT_BEHIND = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
_PIECE = 2**24


def execute_streamed(
    prepared: Prepared,
    observe: Observer,
    status: Callable[[str], None],
    *,
    resume: bool,
    ranks: Ranks | None = None,
) -> Report:
    """Prune block by block from disk to disk; see `apt.run.execute`.

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
    source, work = directory(prepared.shell), Workplace(options.output)
    shards = Shards(source)
    if ranks.first and not resume:
        weights = sum(path.stat().st_size for path in _files(source, shards))
        check_space(work.output, weights + _shelved(prepared))
    status("reading text")
    tokenizer = load_tokenizer(prepared.shell.source, options.tokenizer)
    prepared, bos = sparing(prepared, tokenizer), chosen_bos(options, tokenizer)
    tokens, held_out = texts(prepared, tokenizer)
    status("hashing the model")
    report = unfinished(prepared, tokens, _hash(shards), bos)
    fingerprint = _fingerprint(report, held_out, ranks)
    with _told(options.output), _entered(work, fingerprint, resume, ranks):
        if ranks.first and not work.has("copied"):
            status("copying the checkpoint")
            _copy(source, work.out, shards)
            work.add({"copied": True})
        ranks.wait()
        run = _Run(prepared, shards, work, ranks, status)
        report = replace(
            report,
            sites=run.sites(tokens, held_out, observe),
            scores=scored(prepared, held_out, run.scores()),
            seconds=time.perf_counter() - started,
            ranks=ranks.gather(ranks.work),
        )
        if ranks.first:
            if not work.has("finished"):
                report.write(work.out)
                open_up(work.out)
            work.finish()
    return report


@dataclass
class _Run:
    """The blocks' part of a streamed run, of which the journal knows what is done."""

    prepared: Prepared
    shards: Shards
    work: Workplace
    ranks: Ranks
    status: Callable[[str], None]

    def sites(self, tokens: Tensor, held_out: Tensor | None, observe: Observer) -> list[SitePruned]:
        """Prune, measure before and after, and verify what is left to do of that."""
        if self.work.has("finished"):
            return [site for line in self.work.lines for site in sites_of(line)]
        prepared, shell = self.prepared, self.prepared.shell
        self.status("loading what is not in blocks")
        layout = layout_of(shell, self.shards)
        module = assemble(shell, self.shards, layout, prepared.device)
        check_vocabulary(tokens, module, shell.source.reference)
        blocks = dict(shell.adapter.blocks(module))
        dense, pruned = (
            Shelf(shards, layout, blocks, prepared.device)
            for shards in (self.shards, Shards(self.work.out))
        )
        on_disk = prepared.options.activations == "disk"
        store = DiskStore(self.work.activations) if on_disk else MemoryStore()
        disk = OnDisk(prepared.plan, dense, pruned, prepared.device, self.work, self.ranks)
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
        self.score(module, held_out, pruned, store, "after")
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
        self.work.add({"scores": {when: found}})

    def scores(self) -> dict[str, Any]:
        """What has been measured, as the journal has it."""
        found: dict[str, Any] = {}
        try:
            for line in self.work.lines:
                found |= line.get("scores", {})
        except (TypeError, ValueError) as error:
            raise self.work.damaged() from error
        return found


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
def _entered(
    work: Workplace, fingerprint: dict[str, Any], resume: bool, ranks: Ranks
) -> Iterator[None]:
    """The first rank holds the workplace; the others know what its journal says."""
    with work.entered(fingerprint, resume) if ranks.first else nullcontext():
        work.lines = ranks.share(work.lines)
        yield


@contextmanager
def _told(output: Path) -> Iterator[None]:
    """Say what to do where the disk is full or fails."""
    try:
        yield
    except OSError as error:
        raise AptError(
            f"cannot write {output}: {first_line(error)}",
            "mend that, then give the same command with --resume",
        ) from error


def check_streamable(prepared: Prepared) -> None:
    """Raise where a run cannot be streamed, before any work is done."""
    options = prepared.options
    check_hollow(prepared.shell)
    for given, what in (
        (options.allocation != UNIFORM, "--allocation"),
        (options.dtype != "auto", "--dtype"),
        (bool(options.own_samples), "--own-samples"),
    ):
        if given:
            raise AptError(f"{what} needs the whole model in memory", "leave out --stream or it")


def _files(source: Path, shards: Shards) -> Iterator[Path]:
    """The files that the output has as well; of safetensors files, those that the index names."""
    weights = {entry.file for entry in shards.entries.values()}
    for folder, _, names in os.walk(source):
        for name in names:
            path = Path(folder) / name
            if path.suffix in _LEFT_BEHIND or name == FILE or not path.is_file():
                continue
            if path.suffix != ".safetensors" or path in weights:
                yield path


def _copy(source: Path, target: Path, shards: Shards) -> None:
    """Copy the checkpoint."""
    for path in _files(source, shards):
        into = target / path.relative_to(source)
        into.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, into)
        with into.open("rb") as file:
            os.fsync(file.fileno())


def _hash(shards: Shards) -> str:
    """SHA-256 over the files of the weights."""
    found = hashlib.sha256()
    for path in sorted({entry.file for entry in shards.entries.values()}):
        found.update(f"{path.name}\n".encode())
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                found.update(piece)
    return found.hexdigest()
