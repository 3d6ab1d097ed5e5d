"""``apt-prune plugins``."""

from apt.options import PrintingOptions


def plugins(printing: PrintingOptions) -> None:
    """List the installed plugins.

    Each one is listed with its specs, and with the error if it did not load.
    """
    from apt.cli.listing import show_rows
    from apt.plugin.registry import registry

    installed = registry()
    rows = [
        {
            "distribution": plugin.distribution,
            "entry point": f"{plugin.name} = {plugin.module}",
            "offers": ", ".join(installed.offers(plugin)) or "–",
            "state": "disabled" if plugin.disabled else plugin.problem or "loaded",
        }
        for plugin in installed.plugins.values()
    ]
    show_rows(rows, as_json=printing.as_json)
