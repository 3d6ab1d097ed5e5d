"""``apt-prune inspect``."""

from apt.options import InspectRun, PrintingOptions, PruneOptions


def inspect(run: InspectRun, printing: PrintingOptions) -> None:
    """Show the blocks and sites of a model.

    Also shows the memory and time to prune it. No weights are read.
    """
    from apt.cli.opening import find_model

    source = find_model(run.model, run)

    from apt.checkpoints.load import open_skeleton
    from apt.cli.output import notice
    from apt.cli.plan import show_plan
    from apt.engine.costs import PlannedWork
    from apt.engine.estimate import Planned
    from apt.engine.machine import choose_device
    from apt.engine.opening import pattern_of, selection_of
    from apt.engine.prepare import capped
    from apt.engine.recipes import augmentation_of
    from apt.planning.allocation import default_allocation
    from apt.planning.plan import check_rounding, make_plan, tell_shared
    from apt.plugin.registry import registry
    from apt.plugin.specs import UNIFORM
    from apt.solver import NM
    from apt.solver.options import EFFORTS

    device = choose_device(run.device)
    skeleton = open_skeleton(source, registry(), run.adapter)
    if run.on is None or run.compute != "auto":  # the other devices multiply all dtypes fast
        skeleton = skeleton.computing(run.compute, device)
    selection, pattern = selection_of(run), pattern_of(run) or NM(2, 4)
    plan = make_plan(skeleton.module, skeleton.adapter, pattern, selection)
    seqlen = capped(run.seqlen, skeleton, notice)
    tell_shared(plan, notice)
    check_rounding(plan, notice, quantized=True)  # a run may round the weights
    allocated = default_allocation(pattern, error_aware=True) != UNIFORM
    works = tuple(
        PlannedWork(skeleton, plan, effort, run.samples, seqlen, allocated) for effort in EFFORTS
    )
    usual = augmentation_of(PruneOptions(), registry().default_method(), run.samples)
    planned = Planned(
        skeleton,
        plan,
        usual.samples(run.samples, seqlen),
        seqlen,
        device,
        streamed=run.stream,
        activations=run.activations,
        works=works,
        on=run.on,
    )
    show_plan(planned, as_json=printing.as_json)
