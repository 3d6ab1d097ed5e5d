"""``apt adapters``."""


def adapters() -> None:
    """List the model families that are served."""
    from apt.cli.output import out, table
    from apt.plugins import registry

    shelf = registry().adapters
    made = table("adapter", "model types", "embedded", "from", "summary")
    for name, spec in sorted(shelf.specs.items()):
        embedded = f"zoo:{name}" if spec.zoo else ""
        made.add_row(
            name,
            ", ".join(spec.model_types),
            embedded,
            shelf.origins[name].distribution,
            spec.summary,
        )
    out.print(made)
