"""``apt-prune recover``."""

from pathlib import Path

from apt.options import ConfigOptions, Options, PrintingOptions, RecoverRun, options, plot_option


@options
class PlotOptions(Options):
    """Options for the picture of a training."""

    plot: Path | None = plot_option("the loss")


def recover(
    run: RecoverRun, picture: PlotOptions, config: ConfigOptions, printing: PrintingOptions
) -> None:
    """Train the kept weights of a pruned model; every zero stays zero.

    For example: apt-prune recover ./pruned --minutes 30 --output ./recovered
    """
    from apt.cli.opening import check_plot, run_request

    inputs = (run.model, run.calibration, run.evaluation, run.dense)
    check_plot(picture.plot, *inputs, overwrite=run.overwrite)
    request, notices = run_request(run)

    from apt.cli.recovering import RecoveryWatcher

    watcher = RecoveryWatcher(request, config, notices, picture.plot, as_json=printing.as_json)
    watcher.perform(request)
