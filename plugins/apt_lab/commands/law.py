"""``apt-prune law``."""

from apt.console import Progress, check_plot, say, show, show_json, table
from apt.options import PrintingOptions
from apt_lab.options import LawRun


def law(run: LawRun, printing: PrintingOptions) -> None:
    """Predict how many training tokens a recovery needs.

    The P2 law is fitted to the reports of recoveries: the loss as a function of training tokens,
    pruning rate and model size. For example: apt-prune law ./recovered
    """
    check_plot(run.plot, *run.directories)
    from apt_lab.law import fit_law, read_points

    points = [point for directory in run.directories for point in read_points(directory)]
    with Progress("fitting"):
        fitted = fit_law(points, resamples=run.resamples)
    ends = {point.curve: point for point in sorted(points, key=lambda point: point.tokens)}
    predicted = [
        {
            "directory": name,
            "tokens": point.tokens,
            "loss": point.loss,
            "fitted": fitted.loss(point),
            "enough": fitted.enough(point, run.threshold),
            **({"predicted": fitted.loss(point, run.tokens)} if run.tokens else {}),
        }
        for name, point in ends.items()
    ]
    if run.plot is not None:
        from apt_lab.plots import draw_law

        draw_law(points, fitted, run.plot)
    if printing.as_json:
        show_json({**vars(fitted), "threshold": run.threshold, "runs": predicted})
        return
    parameters = table("parameter", ">value", ">90 % interval")
    for name, value in fitted.values.items():
        low, high = fitted.intervals.get(name, (None, None))
        interval = "" if low is None else f"{low:.3g} … {high:.3g}"
        parameters.add_row(name, f"{value:.4g}", interval)
    show(parameters)
    for line in fitted.missing:
        say(line)
    prediction_column = [f">after {run.tokens:,.0f}"] if run.tokens else []
    runs = table("run", ">tokens", ">loss", ">fitted", ">enough tokens", *prediction_column)
    for entry in predicted:
        runs.add_row(
            str(entry["directory"]),
            f"{entry['tokens']:,.0f}",
            f"{entry['loss']:.4f}",
            f"{entry['fitted']:.4f}",
            f"{entry['enough']:,.0f}",
            *([f"{entry['predicted']:.4f}"] if run.tokens else []),
        )
    show(runs)
    say(
        f"mean error {fitted.error:.4f} nats, average slope difference "
        f"{fitted.slope_difference:.4g} nats per million tokens"
    )
