"""``apt methods``."""


def methods() -> None:
    """List the pruning methods, the most accurate first."""
    from apt.cli.output import out, table
    from apt.plugins import registry

    shelf = registry().methods
    made = table("method", "source", "from", "summary")
    default = registry().default_method().name
    for spec in sorted(shelf.specs.values(), key=lambda spec: -spec.rank):
        summary = f"{spec.summary} (default)" if spec.name == default else spec.summary
        made.add_row(spec.name, spec.source, shelf.origins[spec.name].distribution, summary)
    out.print(made)
