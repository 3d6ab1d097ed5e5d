"""``apt doctor``."""

import typer


def doctor(as_json: bool = typer.Option(False, "--json", help="Print one JSON object.")) -> None:
    """Say what this machine has, what it will run each family with, and what is missing.

    Exit status 1 where something is installed, but does not work.
    """
    import json
    from dataclasses import asdict

    from apt.cli.output import out, table
    from apt.doctor import families, machine, packages, plugins
    from apt.plugins import registry

    shelf = registry()
    sections = {
        "machine": machine(),
        "packages": list(packages()),
        "plugins that failed": list(plugins(shelf)),
        "families": list(families(shelf)),
    }
    if as_json:
        record = {name: [asdict(f) for f in found] for name, found in sections.items()}
        out.print(json.dumps(record), markup=False)
    else:
        for name, found in sections.items():
            if found:
                made = table(name, "", "to better it")
                for finding in found:
                    made.add_row(finding.what, finding.state, finding.remedy)
                out.print(made)
    if any(finding.broken for found in sections.values() for finding in found):
        raise typer.Exit(1)
