"""``apt-prune adapters``."""

from apt.options import PrintingOptions


def adapters(printing: PrintingOptions) -> None:
    """List the supported model families."""
    from apt.cli.listing import show_rows
    from apt.plugin.registry import registry

    installed = registry().adapters
    rows = [
        {
            "adapter": name,
            "model types": ", ".join(spec.model_types),
            "embedded": f"zoo:{name}" if spec.zoo else "",
            "from": installed.origins[name].distribution,
            "summary": spec.summary,
        }
        for name, spec in sorted(installed.specs.items())
    ]
    show_rows(rows, as_json=printing.as_json)
