"""A whole run of ``apt-prune prune``, from the options to a directory on disk."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from apt.distributed.ranks import Ranks
from apt.engine.in_memory import InMemoryRun
from apt.engine.measures import scores
from apt.engine.new_report import calibration_of, new_report
from apt.engine.prepare import Prepared
from apt.engine.prune_model import Job, named_allocation, prune_model
from apt.engine.shrink_plan import removal
from apt.engine.storage import RunStorage
from apt.engine.streamed import StreamedRun
from apt.engine.text import Text, read_text
from apt.events import Observer, telling
from apt.output.report import Report
from apt.output.timeline import Timeline
from apt.planning.plan import Plan
from apt.shrinking.record import structure_record


def execute(
    prepared: Prepared,
    observe: Observer,
    status: Callable[[str], None],
    *,
    ranks: Ranks | None = None,
) -> Report:
    """Read text and model, prune, write and verify.

    Args:
        prepared: the checked run.
        observe: called with the events of `apt.events`.
        status: called with a text for each step outside the loop over blocks.
        ranks: the processes that prune together. Only the first measures and writes, but all read:
            a streamed output must be in a place that every process can read.

    Raises:
        AptError: an error of the checkpoint, the text or the disk. Nothing is written then, except
            for the workplace from which a streamed run can be resumed.
    """
    started, ranks = time.perf_counter(), ranks or Ranks()
    if ranks.first:
        observe = telling(observe, prepared.registry.site_pruned)
    timeline = Timeline(status, observe)
    status = timeline.status
    storage: RunStorage = (StreamedRun if prepared.options.stream else InMemoryRun)(
        prepared, timeline, ranks
    )
    storage.check_space()
    with storage.opened():
        status("reading text")
        text = read_text(prepared)
        text = text if ranks.first else replace(text, held_out=None)
        report = storage.begin(text, new_report(prepared, text))
        if (earlier := storage.earlier_report()) is not None:
            return earlier
        text.check(storage.model, prepared.shell.source.reference)
        job = job_of(prepared, text)
        tokens = storage.own_text(job, text.tokens)
        before = storage.measure(text.held_out, "before")
        plan, sites = prune_model(
            storage.model,
            tokens,
            job,
            block_storage=storage.block_storage,
            store=storage.store,
            ranks=ranks,
            observe=timeline.observe,
            status=status,
            readable=storage.readable,
            remember=storage.remember,
        )
        report = replace(
            report,
            calibration=report.calibration | calibration_of(tokens),
            sites=sites,
            skipped=plan.dense,
            scores=scores(prepared, text.held_out, before),
            ranks=ranks.gather(ranks.work),
            structure=_structure(prepared, plan),
        )
        if ranks.first:
            report = storage.write(replace(report, seconds=time.perf_counter() - started), plan)
    if ranks.first and prepared.structure is not None:
        prepared.structure.journal.clear()  # of a search, no longer needed
    return storage.with_final_scores(report) if ranks.first else report


def job_of(prepared: Prepared, text: Text) -> Job:
    """The adapter, plan, method and settings of a run."""
    options, method = prepared.options, prepared.method.load()
    allocation = None
    if prepared.structure is None:
        allocation = named_allocation(options.allocation, prepared.plan, prepared.registry)
    if prepared.structure is not None and options.shrink is not None:
        method = removal(prepared.structure, options.shrink.compensate)
    return Job(
        prepared.shell.adapter,
        prepared.plan,
        method,
        prepared.recipe,
        prepared.augmentation,
        allocation=allocation,
        structure=prepared.structure,
        seed=options.seed,
        bos=text.bos,
        special=text.special,
    )


def _structure(prepared: Prepared, plan: Plan) -> dict[str, Any]:
    """The record of the structure of a smaller model; empty for a sparse one."""
    shell = prepared.shell
    if prepared.structure is None:
        return {}
    return structure_record(prepared.structure, plan, shell.module, shell.adapter, shell.config)
