"""``apt plugins``."""


def plugins() -> None:
    """List the installed plugins: what loaded, from where, and what failed and why."""
    from apt.cli.output import out, table
    from apt.plugins import registry

    shelf = registry()
    made = table("distribution", "entry point", "offers", "state")
    for plugin in shelf.plugins.values():
        state = "disabled" if plugin.disabled else plugin.problem or "loaded"
        offers = ", ".join(shelf.offers(plugin)) or "–"
        made.add_row(plugin.distribution, f"{plugin.name} = {plugin.module}", offers, state)
    out.print(made)
