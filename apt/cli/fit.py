"""``apt-prune fit``."""

from apt.options import ConfigOptions, FitRun, PrintingOptions


def fit(run: FitRun, config: ConfigOptions, printing: PrintingOptions) -> None:
    """Write the best file of a given size: a kind of numbers for each tensor, rounded in turn.

    For example: apt-prune fit MODEL --size 73MiB -o small.gguf
    """
    from apt.cli.opening import run_request

    request, notices = run_request(run)

    from apt.cli.fitting import FitWatcher

    FitWatcher(request, config, notices, as_json=printing.as_json).perform(request)
