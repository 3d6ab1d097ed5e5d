"""A whole run in memory, from references to a directory on disk; what ``apt-prune prune`` does."""

import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt.checkpoints.copies import copied_size
from apt.checkpoints.load import fingerprint, load, load_tokenizer, skeleton
from apt.checkpoints.model import Model
from apt.checkpoints.save import keep_side_files, save_model
from apt.checkpoints.stored import Stored, find_stored, local_directory
from apt.checkpoints.verify import failures, verify
from apt.distributed.ranks import Ranks
from apt.events import Observer, SitePruned, telling
from apt.output.card import write_card
from apt.output.location import check_space
from apt.output.report import Report
from apt.output.workplace import whole_directory, writing
from apt.planning.allocation import UNIFORM, allocated
from apt.pruning.pipeline import prune_blocks
from apt.runs.machine import read_dtype
from apt.runs.prepare import Prepared, RunOptions
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
from apt.text.sampling import mixed
from apt.text.self_generated import own_text
from apt.text.special_tokens import special_ids


def execute(
    prepared: Prepared,
    observe: Observer,
    status: Callable[[str], None],
    *,
    ranks: Ranks | None = None,
) -> Report:
    """Load, prune, save and verify.

    Args:
        prepared: the checked run.
        observe: called with the pipeline's events.
        status: told what is being done outside the pipeline.
        ranks: the processes that do this together, the first of which measures and writes.

    Raises:
        AptError: the checkpoint, the text or the disk is at fault; nothing is written then.
    """
    started, options, ranks = time.perf_counter(), prepared.options, ranks or Ranks()
    stored = find_stored(prepared.shell) if options.dtype == "auto" else None
    check_space(options.output, _bytes(prepared, stored))
    place = whole_directory(options.output, options.overwrite) if ranks.first else nullcontext()
    with place as work:
        status("reading text")
        tokenizer = load_tokenizer(prepared.shell.source, options.tokenizer)
        prepared = sparing(prepared, tokenizer)
        tokens, held_out = texts(prepared, tokenizer)
        held_out = held_out if ranks.first else None
        status("loading the model")
        dtype = stored.dtype(prepared.shell, prepared.plan) if stored else None
        model = load(prepared.shell, read_dtype(options.dtype) or dtype, prepared.device)
        stored = stored if stored and _copied(stored, model) else None
        for given in (tokens, held_out):
            if given is not None:
                check_vocabulary(given, model.module, model.source.reference)
        tokens = _with_own_text(options, model, tokenizer, tokens, status, ranks)
        prepared = _with_allocation(prepared, model, tokens, status, ranks)
        report = unfinished(
            prepared, tokens, fingerprint(model.module), chosen_bos(options, tokenizer)
        )
        report = _pruned(prepared, model, tokens, held_out, report, observe, status, ranks)
        if work is None:
            return report
        status("saving and verifying")
        with writing(options.output):
            _save(prepared, model, stored, tokenizer, work.out)
        del model
        gc.collect()
        saved = _verified(prepared, work.out, read_dtype(options.dtype) or dtype)
        report = replace(report, seconds=time.perf_counter() - started)
        _record(report, work.out, prepared)
    if held_out is not None:
        report = _measured_after(prepared, saved, held_out, report, started, status)
    return report


def _with_own_text(
    options: RunOptions,
    model: Model,
    tokenizer: Any,
    tokens: Tensor,
    status: Callable[[str], None],
    ranks: Ranks,
) -> Tensor:
    """The tokens to calibrate on, with those that the model writes itself, if any are asked for."""
    if not options.own_samples:
        return tokens
    status("writing text to calibrate on")
    if ranks.first:
        own = own_text(
            model.module,
            options.own_samples,
            options.seqlen,
            options.seed,
            bos=chosen_bos(options, tokenizer),
            special=special_ids(tokenizer),
        )
        tokens = mixed(tokens, own, options.seed)
    return ranks.share(tokens)


def _with_allocation(
    prepared: Prepared,
    model: Model,
    tokens: Tensor,
    status: Callable[[str], None],
    ranks: Ranks,
) -> Prepared:
    """The run with its sparsity shared out, where that is asked for."""
    name = prepared.options.allocation
    if name == UNIFORM:
        return prepared
    status(f"sharing out the sparsity ({name})")
    share_out = prepared.registry.allocations.get(name)
    plan = allocated(prepared.plan, share_out, model.module, model.adapter, tokens)
    return replace(prepared, plan=ranks.share(plan))


def _pruned(
    prepared: Prepared,
    model: Model,
    tokens: Tensor,
    held_out: Tensor | None,
    report: Report,
    observe: Observer,
    status: Callable[[str], None],
    ranks: Ranks,
) -> Report:
    """Prune a model that is loaded, and measure it before where there is text for that."""
    scores: dict[str, Any] = {}
    if held_out is not None:
        with model.adapter.running(model.module):
            scores["before"] = measure(prepared, model.module, held_out, "before", status)
    sites = _prune(prepared, model, tokens, observe, ranks)
    scores = scored(prepared, held_out, scores)
    return replace(report, sites=sites, scores=scores, ranks=ranks.gather(ranks.work))


def _copied(stored: Stored, model: Model) -> bool:
    """Whether the model's blocks are what is stored, so that a copy of that can be written over."""
    names = [
        f"{name}.{path}"
        for name, block in model.adapter.blocks(model.module)
        for path, _ in block.named_parameters()
    ]
    return stored.holds(model.module, names)


def _save(
    prepared: Prepared, model: Model, stored: Stored | None, tokenizer: Any, directory: Path
) -> None:
    """Write a pruned model: as a copy of its checkpoint where that is possible."""
    largest = prepared.options.max_shard_size
    if stored is not None:
        stored.copy(directory, tokenizer if prepared.options.tokenizer else None, largest)
        stored.write(model.module, prepared.plan, directory)
        return
    save_model(model.module, tokenizer, directory, model.checkpoint, largest)
    if not model.source.gguf:
        keep_side_files(local_directory(model), directory)


def _measured_after(
    prepared: Prepared,
    saved: Model,
    held_out: Tensor,
    report: Report,
    started: float,
    status: Callable[[str], None],
) -> Report:
    """Measure the model as it was written, which is in its place, and complete the report.

    Raises:
        Unmeasured: a measure failed.
    """
    problem = None
    try:
        with saved.adapter.running(saved.module):
            after = measure(prepared, saved.module, held_out, "after", status)
        report = replace(report, scores=report.scores | {"after": after})
    except Exception as error:  # a measure that fails must not lose what it measures
        problem = Unmeasured(prepared.options.output, error)
        report = replace(report, problems=[str(problem)])
    report = replace(report, seconds=time.perf_counter() - started)
    _record(report, prepared.options.output, prepared)
    if problem is not None:
        raise problem
    return report


def _record(report: Report, directory: Path, prepared: Prepared) -> None:
    """Write the model card and the report."""
    source = prepared.shell.source
    with writing(prepared.options.output):
        write_card(directory, report, None if source.gguf else local_directory(prepared.shell))
        report.write(directory)


def _bytes(prepared: Prepared, stored: Stored | None) -> int:
    """How large the output will be on disk."""
    shell = prepared.shell
    if stored is not None:
        return copied_size(stored.directory, stored.shards)
    dtype = read_dtype(prepared.options.dtype) or shell.dtype
    return sum(parameter.numel() for parameter in shell.module.parameters()) * dtype.itemsize


def _prune(
    prepared: Prepared, model: Model, tokens: Tensor, observe: Observer, ranks: Ranks
) -> list[SitePruned]:
    return prune_blocks(
        model.module,
        model.adapter,
        prepared.plan,
        tokens,
        prepared.method.load(),
        **vars(prepared.mode),
        ranks=ranks,
        observe=telling(observe, prepared.registry.site_pruned),
    )


def _verified(prepared: Prepared, directory: Path, dtype: torch.dtype | None) -> Model:
    """Open what was written as anybody would, and hold it against the plan."""
    shell = prepared.shell
    source = replace(shell.source, location=str(directory), gguf=None)
    saved = load(skeleton(source, prepared.registry, shell.spec.name), dtype, prepared.device)
    if failed := failures(verify(saved.module, shell.adapter, prepared.plan)):
        raise RuntimeError(f"{failed[0].name} as written: {failed[0].detail}")
    return saved
