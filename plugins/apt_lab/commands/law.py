"""``apt-prune law``."""

from importlib.util import find_spec
from pathlib import Path

import typer

from apt.cli import arguments as args
from apt.cli import run_arguments as run
from apt.errors import AptError


def law(
    directories: list[Path] = typer.Argument(
        metavar="DIR", help="Recovered models, written by apt-prune recover."
    ),
    tokens: float | None = typer.Option(
        None, "--tokens", metavar="N", help="Also predict the loss after N training tokens."
    ),
    threshold: float = typer.Option(
        0.01,
        "--threshold",
        metavar="NATS",
        help="Tokens are enough if twice as many lower the loss by less than this.",
    ),
    resamples: int = typer.Option(
        200, "--resamples", metavar="N", help="Bootstrap samples for the intervals; 0 for none."
    ),
    plot: Path | None = typer.Option(
        None,
        "--plot",
        metavar="FILE",
        help="Draw the curves into a .png, .svg or .pdf file (needs matplotlib).",
    ),
    as_json: bool = args.JSON,
) -> None:
    """Predict how many training tokens a recovery needs.

    The P2 law is fitted to the reports of recoveries: the loss as a function of training tokens,
    pruning rate and model size. For example: apt-prune law ./recovered
    """
    if not 0 < threshold < float("inf"):
        raise AptError(f"--threshold {threshold} is not above 0")
    if resamples < 0:
        raise AptError(f"--resamples {resamples} is negative")
    if tokens is not None and not 0 < tokens < float("inf"):
        raise AptError(f"--tokens {tokens} is not above 0")
    run.check_plot(plot, *directories)
    if find_spec("scipy") is None:
        raise AptError("law needs scipy", "pip install 'apt-prune[recover]'")

    from apt.cli.output import out, show, show_json, table
    from apt.cli.progress import Progress
    from apt.recovery.law import fit_law
    from apt_lab.recoveries import read_points

    points = [point for directory in directories for point in read_points(directory)]
    with Progress("fitting"):
        fitted = fit_law(points, resamples=resamples)
    ends = {point.curve: point for point in sorted(points, key=lambda point: point.tokens)}
    predicted = [
        {
            "directory": name,
            "tokens": point.tokens,
            "loss": point.loss,
            "fitted": fitted.loss(point),
            "enough": fitted.enough(point, threshold),
            **({"predicted": fitted.loss(point, tokens)} if tokens else {}),
        }
        for name, point in ends.items()
    ]
    if plot is not None:
        from apt_lab.plots import draw_law

        draw_law(points, fitted, plot)
    if as_json:
        show_json({**vars(fitted), "threshold": threshold, "runs": predicted})
        return
    parameters = table("parameter", ">value", ">90 % interval")
    for name, value in fitted.values.items():
        low, high = fitted.intervals.get(name, (None, None))
        interval = "" if low is None else f"{low:.3g} … {high:.3g}"
        parameters.add_row(name, f"{value:.4g}", interval)
    show(parameters)
    for line in fitted.missing:
        out.print(line, markup=False)
    more = [f">after {tokens:,.0f}"] if tokens else []
    runs = table("run", ">tokens", ">loss", ">fitted", ">enough tokens", *more)
    for entry in predicted:
        runs.add_row(
            str(entry["directory"]),
            f"{entry['tokens']:,.0f}",
            f"{entry['loss']:.4f}",
            f"{entry['fitted']:.4f}",
            f"{entry['enough']:,.0f}",
            *([f"{entry['predicted']:.4f}"] if tokens else []),
        )
    show(runs)
    out.print(
        f"mean error {fitted.error:.4f} nats, average slope difference "
        f"{fitted.slope_difference:.4g} nats per million tokens",
        markup=False,
    )
