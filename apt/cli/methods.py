"""``apt-prune methods``."""

from typing import Any

from apt.options import PrintingOptions


def methods(printing: PrintingOptions) -> None:
    """List methods, allocations and kinds of recovery.

    The most accurate methods of prune and of shrink come first.
    """
    from apt.cli.listing import show_rows
    from apt.planning.allocation import UNIFORM
    from apt.plugin.registry import registry

    installed = registry()
    removed = {"columns": "shrink: groups", "groups": "shrink: groups", "blocks": "shrink: blocks"}
    defaults = {
        installed.default_method().name,
        UNIFORM,
        *(installed.default_shrink_method(blocks=blocks).name for blocks in (False, True)),
    }
    specs: list[tuple[str, Any, Any]] = [
        ("prune", spec, installed.methods) for spec in _ranked(installed.methods)
    ] + [
        (removed[spec.chooses], spec, installed.shrink_methods)
        for spec in sorted(_ranked(installed.shrink_methods), key=lambda s: s.chooses == "blocks")
    ]
    shared = installed.allocations
    specs += [("prune: allocation", spec, shared) for spec in shared.specs.values()]
    specs += [
        ("recover", spec, installed.recoveries) for spec in installed.recoveries.specs.values()
    ]
    rows = [
        {
            "method": spec.name,
            "for": use,
            "source": spec.source,
            "from": catalog.origins[spec.name].distribution,
            "summary": f"{spec.summary} (default)" if spec.name in defaults else spec.summary,
        }
        for use, spec, catalog in specs
    ]
    show_rows(rows, as_json=printing.as_json)


def _ranked(catalog: Any) -> list[Any]:
    """The specs of a catalog, those of the highest rank first."""
    return sorted(catalog.specs.values(), key=lambda spec: -spec.rank)
