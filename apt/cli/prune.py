"""``apt-prune prune``."""

from apt.options import ConfigOptions, DryRunOptions, PrintingOptions, PruneRun


def prune(
    run: PruneRun, config: ConfigOptions, plan: DryRunOptions, printing: PrintingOptions
) -> None:
    """Prune a model and write a Hugging Face directory.

    For example: apt-prune prune --adapter llama
    """
    from apt.cli.opening import opened

    run, notices = opened(run)

    from apt.cli import packing, pruning

    if run.pack is not None:
        packing.check_packed_place(run.pack, run)
    pruning.start(run, config, plan, printing, notices)
    if run.pack is not None and not plan.dry_run:  # also where the output was complete before
        packing.pack_output(run.pack, run)
