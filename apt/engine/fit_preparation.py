"""The preparation of a fit: the checks before the work, for a model and for a smaller one of it."""

import time
from dataclasses import replace
from pathlib import Path

from apt.checkpoints.load import open_skeleton
from apt.checkpoints.opened import Opened
from apt.distributed.ranks import Ranks
from apt.engine.file_forms import smaller_models
from apt.engine.fit_tables import read_table
from apt.engine.fit_targets import (
    FitTarget,
    check_target_place,
    compressed_target,
    file_target,
    packed_target,
)
from apt.engine.fit_task import FitTask
from apt.engine.machine import choose_device, read_dtype
from apt.engine.opening import RunRequest
from apt.engine.packed_form import Means
from apt.engine.prepare import Notice, capped, ignore_notice, tell_adapter, with_compute
from apt.engine.prune_task import check_memory
from apt.engine.pruning_plan import fit_job
from apt.errors import AptError
from apt.files.journal import journal_beside
from apt.fit.choice import smallest_size
from apt.locations.model_source import find
from apt.options import FitRun
from apt.options.fit import VLLM
from apt.plugin.registry import Registry


def prepare_fit(
    request: RunRequest[FitRun], registry: Registry, notice: Notice, ranks: Ranks
) -> FitTask:
    """Check a run that fits a model into a budget.

    Raises:
        AptError: an option does not fit the model, the machine or the disk, even the smallest
            output is larger than the budget, or there are several processes.
    """
    started, options, source = time.perf_counter(), request.options, request.source
    if ranks.size > 1:  # each rank would have the bytes of the weights that it rounds
        raise AptError("fit runs in one process", "start it without torchrun")
    texts = [options.calibration, options.evaluation, options.tokenizer]
    spec = check_target_place(request, texts, registry, notice)
    skeleton = open_skeleton(source, registry, options.adapter, expanded=True)
    skeleton.check_windows("fit")
    if options.adapter is None:
        tell_adapter(skeleton, notice)
    device, dtype = choose_device(options.device), read_dtype(options.dtype)
    skeleton = with_compute(skeleton, options, device, notice)
    weights = sum(parameter.numel() for parameter in skeleton.module.parameters())
    budget, job = options.budget(weights), fit_job(skeleton, options, notice, zeros=options.zeros)
    target: FitTarget
    if spec is not None:
        target = file_target(spec, skeleton)
    else:
        if options.minutes is not None:  # a copy of the checkpoint would have its norms
            dtype = dtype or skeleton.dtype
        means = Means.named(options.means, options.scale_group, registry.default_method().per)
        if options.target == VLLM:
            target = compressed_target(skeleton, job.plan, means, dtype, budget)
        else:
            largest, context = budget if options.speed is None else None, options.counted_context
            target = packed_target(skeleton, job.plan, means, dtype, largest, context)
    if options.speed is None:
        _check_smallest(target, skeleton, options, budget)
    options = replace(
        options, adapter=skeleton.spec.name, seqlen=capped(options.seqlen, skeleton, notice)
    )
    table = None if options.table_from is None else read_table(options.table_from, target.form)
    task = FitTask(
        options=options, registry=registry, skeleton=skeleton, device=device, dtype=dtype,
        plan=target.plan, job=job, notice=notice, target=target, budget=budget, table=table,
        journal=journal_beside(options.directory, "table", "a fit"), dense=source,
        ends=None if options.minutes is None else started + 60 * options.minutes,
    )  # fmt: skip
    check_memory(task)
    return task


def _check_smallest(target: FitTarget, skeleton: Opened, options: FitRun, budget: int) -> None:
    """Raise if even the smallest output is larger than the budget."""
    given, smallest = options.may is not None, smallest_size(target.form)
    if smallest > budget or given:
        rows = smaller_models(
            target.smaller_form, skeleton, options.means, given=given, smallest=True
        )
        smallest = min([smallest, *(each.smallest for row in rows for each in row)])
    if smallest > budget:
        verb = "has" if target.is_exact else "may have"
        others = [name for name in options.possible_means if name not in options.means]
        raise AptError(
            f"{options.model} does not fit into {budget:,} bytes: its smallest {target.words} "
            f"{verb} {smallest:,} ({smallest / 2**20:.1f} MiB)",
            "give a larger size" + (f", or allow {', '.join(others)}" if others else ""),
            ("size", "bits", "memory"),
        )


def smaller_task(task: FitTask, place: Path) -> FitTask:
    """The fit of a smaller model in a directory, in place of the model from which it was made."""
    options = task.options
    source = find(str(place), task.registry, trust_remote_code=options.trust_remote_code)
    opened = open_skeleton(source, task.registry, task.skeleton.spec.name, expanded=True)
    opened = with_compute(opened, options, task.device, ignore_notice)
    target = task.target.of_smaller(opened)
    return replace(
        task, skeleton=opened, target=target, plan=target.plan,
        job=fit_job(opened, options, ignore_notice, zeros=options.zeros), table=None,
        journal=journal_beside(place, "table", "a fit"), ends=None,
    )  # fmt: skip
