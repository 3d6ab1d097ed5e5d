"""``apt-prune recover``."""

from importlib.util import find_spec
from pathlib import Path

from apt.errors import AptError
from apt.options import OUTPUT, ConfigOptions, Options, PrintingOptions, RecoverRun, option, options


@options
class PlotOptions(Options):
    """Options for the picture of a training."""

    plot: Path | None = option(
        "Draw the loss into a .png, .svg or .pdf file (needs matplotlib).",
        default=None, panel=OUTPUT, metavar="FILE", saved=False,
    )  # fmt: skip


def recover(
    run: RecoverRun, picture: PlotOptions, config: ConfigOptions, printing: PrintingOptions
) -> None:
    """Train the kept weights of a pruned model; every zero stays zero.

    For example: apt-prune recover ./pruned --minutes 30 --output ./recovered
    """
    from apt.cli.opening import check_plot, opened

    inputs = (run.model, run.calibration, run.evaluation, run.dense)
    check_plot(picture.plot, *inputs, overwrite=run.overwrite)
    missing = [name for name in ("accelerate", "peft") if find_spec(name) is None]
    if missing:
        raise AptError(f"recover needs {' and '.join(missing)}", "pip install 'apt-prune[recover]'")
    run, notices = opened(run)

    from apt.cli.recovering import start

    start(run, config, picture.plot, printing, notices)
