"""``apt-prune shrink``."""

from pathlib import Path

from apt.errors import AptError
from apt.options import (
    ConfigOptions,
    DryRunOptions,
    Options,
    PrintingOptions,
    ShrinkRun,
    options,
    plot_option,
)


@options
class PlotOptions(Options):
    """Options for the picture of a search."""

    plot: Path | None = plot_option("the candidates of --search")


def shrink(
    run: ShrinkRun,
    picture: PlotOptions,
    config: ConfigOptions,
    plan: DryRunOptions,
    printing: PrintingOptions,
) -> None:
    """Make a smaller dense model, which plain transformers opens.

    Channels, heads, states or whole blocks are removed, and the weights that are left compensate.
    For example: apt-prune shrink --adapter llama --keep 0.75
    """
    from apt.cli.opening import check_plot, run_request

    if picture.plot is not None and run.mode != "search":
        raise AptError("plot draws the candidates of a search", "search for a size", ("mode",))
    check_plot(picture.plot, run.model, run.calibration, run.evaluation, overwrite=run.overwrite)
    request, notices = run_request(run)

    from apt.cli.pruning import PruningWatcher

    watcher = PruningWatcher(request, config, notices, as_json=printing.as_json)
    watcher.perform(request, dry_run=plan.dry_run)
    if picture.plot is not None and watcher.report is not None:
        from apt.cli.plots import draw_candidates

        candidates = watcher.report.structure["candidates"]
        draw_candidates(candidates, picture.plot, overwrite=run.overwrite)
