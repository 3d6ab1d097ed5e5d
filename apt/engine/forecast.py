"""The plan of a run with the memory and time that it needs, for dry runs and ``inspect``."""

from typing import TYPE_CHECKING

from apt.checkpoints.load import open_skeleton
from apt.distributed.ranks import Ranks
from apt.engine.costs import PlannedRun
from apt.engine.in_memory import InMemory
from apt.engine.machine import choose_device
from apt.engine.opening import pattern_of, selection_of
from apt.engine.prepare import Notice, capped, tower_in
from apt.engine.recipes import additions_of
from apt.engine.streamed import Streamed
from apt.events import Status
from apt.locations.model_source import Source
from apt.options import DEFAULT_PATTERN, InspectRun, PruneRun
from apt.output.report import peak_memory
from apt.planning.allocation import default_allocation
from apt.planning.plan import Plan, check_rounding, make_plan, read_pattern, tell_idle, tell_shared
from apt.plugin.registry import Registry
from apt.plugin.specs import UNIFORM
from apt.solver.options import EFFORTS

if TYPE_CHECKING:
    from apt.engine.prune_task import PruneTask  # with all that a training needs


def forecast(task: "PruneTask", status: Status) -> PlannedRun:
    """The plan of a task, with the levels that its allocation chooses."""
    process = peak_memory()["cpu"]  # before the model is loaded
    options, job, recipe = task.options, task.job, task.job.recipe
    plan = _final_plan(task, status)
    is_default = task.method.name == task.registry.default_method().name and recipe.error_aware
    return PlannedRun(
        task.skeleton, plan, options, job.augmentation, task.device,
        error_aware=recipe.error_aware, tuned=recipe.tuning is not None, norms=job.norms,
        factors=task.method.factors, allocated=job.allocation is not None,
        efforts=(options.effort,) if is_default and isinstance(options, PruneRun) else (),
        process=process,
    )  # fmt: skip


def _final_plan(task: "PruneTask", status: Status) -> Plan:
    """The final plan. An allocation needs the text and the model, which are read as in a run."""
    if task.job.allocation is None:
        return task.job.plan
    status("reading text")
    text = task.read_text(Ranks())
    store = (Streamed if task.stream else InMemory)(task, status=status)
    store.read()
    store.begin(text)
    return task.decide(store, text)[1]


def default_forecast(
    run: InspectRun, source: Source, registry: Registry, notice: Notice
) -> PlannedRun:
    """The plan of a run with default options, for a model and a pattern."""
    device = choose_device(run.device)
    skeleton = open_skeleton(source, registry, run.adapter, expanded=True)
    skeleton = tower_in(skeleton, run.stack, registry, run.adapter)
    if run.on is None or run.compute != "auto":  # the other devices multiply all dtypes fast
        skeleton = skeleton.computing(run.compute, device)
    selection, pattern = selection_of(run), pattern_of(run) or read_pattern(DEFAULT_PATTERN)
    plan = make_plan(skeleton.module, skeleton.adapter, pattern, selection)
    seqlen = capped(run.seqlen, skeleton, notice)
    tell_shared(plan, notice)
    tell_idle(skeleton.adapter, skeleton.module, notice)
    check_rounding(plan, notice, quantized=True)  # a run may round the weights
    allocated = default_allocation(pattern, error_aware=True) != UNIFORM
    options = PruneRun(
        samples=run.samples, seqlen=seqlen, stream=run.stream, activations=run.activations
    )
    augmentation, norms = additions_of(options, registry.default_method(), skeleton)
    return PlannedRun(
        skeleton, plan, options, augmentation, device, norms=norms, allocated=allocated,
        efforts=EFFORTS, on=run.on,
    )  # fmt: skip
