"""``apt-prune fit``."""

from pathlib import Path

from apt.options import ConfigOptions, FitRun, Options, PrintingOptions, options, plot_option


@options
class PlotOptions(Options):
    """Options for the picture of the frontier."""

    plot: Path | None = plot_option("the predicted loss of the best files of ten sizes")


def fit(
    run: FitRun, picture: PlotOptions, config: ConfigOptions, printing: PrintingOptions
) -> None:
    """Write the best file or packed directory of a given size, or of a given speed.

    Each tensor gets the kind of numbers, and in a packed directory the share of zeros, that serves
    the whole best.

    For example: apt-prune fit MODEL --size 73MiB -o small.gguf
    """
    from apt.cli.opening import check_plot, run_request

    check_plot(picture.plot, run.model, run.calibration, run.evaluation, overwrite=run.overwrite)
    request, notices = run_request(run)

    from apt.cli.fitting import FitWatcher

    watcher = FitWatcher(request, config, notices, as_json=printing.as_json)
    watcher.perform(request)
    if picture.plot is not None and watcher.report is not None:
        from apt.cli.plots import draw_frontier

        draw_frontier(watcher.report.fit, picture.plot, overwrite=run.overwrite)
