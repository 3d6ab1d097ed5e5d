"""``apt-prune doctor``."""

import typer

from apt.options import PrintingOptions


def doctor(printing: PrintingOptions) -> None:
    """Show the state of this machine, packages and plugins.

    Also shows the implementation that is used for each model family. The exit status is 1 if a
    component is installed but does not work.
    """
    from dataclasses import asdict

    from apt.cli.output import show, show_json, table
    from apt.plugin.doctor import Finding, families, machine, packages, plugins
    from apt.plugin.registry import registry
    from apt.runtime.linear import describe_kernels

    installed = registry()
    sections = {
        "machine": machine(),
        "packages": list(packages()),
        "packed models": [Finding("products", *describe_kernels())],
        "plugins that failed": list(plugins(installed)),
        "families": list(families(installed)),
    }
    if printing.as_json:
        show_json({name: [asdict(f) for f in findings] for name, findings in sections.items()})
    else:
        for name, findings in sections.items():
            if findings:
                made = table(name, "", "remedy")
                for finding in findings:
                    made.add_row(finding.what, finding.state, finding.remedy)
                show(made)
    if any(finding.broken for findings in sections.values() for finding in findings):
        raise typer.Exit(1)
