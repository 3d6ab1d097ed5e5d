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

    from apt.cli.pruning import export_result, pack_result, start

    start(run, config, plan, printing, notices)
    if not plan.dry_run:
        pack_result(run)  # also where the output was complete before
        export_result(run)
