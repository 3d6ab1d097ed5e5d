"""``apt-prune methods``."""

from apt.cli import arguments as args


def methods(as_json: bool = args.JSON) -> None:
    """List the pruning methods, the most accurate first."""
    from apt.cli.listing import show_rows
    from apt.plugin.registry import registry

    installed, default = registry().methods, registry().default_method().name
    rows = [
        {
            "method": spec.name,
            "source": spec.source,
            "from": installed.origins[spec.name].distribution,
            "summary": f"{spec.summary} (default)" if spec.name == default else spec.summary,
        }
        for spec in sorted(installed.specs.values(), key=lambda spec: -spec.rank)
    ]
    show_rows(rows, as_json=as_json)
