"""``apt-prune inspect``."""

from apt.options import InspectRun, PrintingOptions


def inspect(run: InspectRun, printing: PrintingOptions) -> None:
    """Show the blocks and sites of a model.

    Also shows the memory and time to prune it. No weights are read.
    """
    from apt.cli.opening import find_model

    source = find_model(run.model, run)

    from apt.cli.output import notice
    from apt.cli.plan import show_plan
    from apt.engine.forecast import default_forecast
    from apt.plugin.registry import registry

    show_plan(default_forecast(run, source, registry(), notice), as_json=printing.as_json)
