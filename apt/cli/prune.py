"""``apt-prune prune``."""

from apt.options import ConfigOptions, DryRunOptions, PrintingOptions, PruneRun


def prune(
    run: PruneRun, config: ConfigOptions, plan: DryRunOptions, printing: PrintingOptions
) -> None:
    """Prune a model and write a Hugging Face directory.

    For example: apt-prune prune --adapter llama
    """
    from apt.cli.opening import run_request

    request, notices = run_request(run)

    from apt.cli.pruning import PruningWatcher

    watcher = PruningWatcher(request, config, notices, as_json=printing.as_json)
    watcher.perform(request, dry_run=plan.dry_run)
