"""``apt-prune doctor``, ``adapters``, ``methods`` and ``plugins``: the installed components."""

from dataclasses import asdict
from typing import Any

import typer

from apt.cli.output import show, show_json, show_rows, table
from apt.options import RUNNING, DeviceOptions, PrintingOptions, option, options
from apt.plugin.registry import listed, registry
from apt.plugin.specs import AUTO


@options
class TestOptions(DeviceOptions):
    """The options of ``apt-prune doctor``."""

    test: bool = option(
        "Test this machine in half a minute: solves, captured inputs, a run, the same run "
        "streamed, packed products, and two processes.",
        default=False, panel=RUNNING, saved=False,
    )  # fmt: skip


def doctor(testing: TestOptions, printing: PrintingOptions) -> None:
    """Show the state of this machine, packages and plugins.

    Also shows the implementation that is used for each model family. The exit status is 1 if a
    component is installed but does not work, or if a test fails.
    """
    if testing.test:
        _test(testing.device, as_json=printing.as_json)
        return
    from apt.plugin.doctor import Finding, families, machine, packages, plugins
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
                finding_table = table(name, "", "remedy")
                for finding in findings:
                    finding_table.add_row(finding.what, finding.state, finding.remedy)
                show(finding_table)
    if any(finding.broken for findings in sections.values() for finding in findings):
        raise typer.Exit(1)


def _test(device: str, *, as_json: bool) -> None:
    """Test a device, and print a table to be pasted into an issue."""
    from apt.cli.progress import Progress
    from apt.engine.machine import choose_device
    from apt.engine.self_test import self_test

    device = choose_device(device)
    with Progress() as progress:
        tests = list(self_test(device, registry(), progress.status))
    if as_json:
        show_json({"device": device, "tests": [asdict(test) for test in tests]})
    else:
        test_table = table(f"test of {device}", "outcome", "", ">seconds")
        for test in tests:
            test_table.add_row(test.what, test.outcome, test.detail, f"{test.seconds:.1f}")
        show(test_table)
    if any(test.outcome == "failed" for test in tests):
        raise typer.Exit(1)


def adapters(printing: PrintingOptions) -> None:
    """List the supported model families."""
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


def methods(printing: PrintingOptions) -> None:
    """List methods, patterns, allocations and kinds of recovery.

    The most accurate methods of prune and of shrink come first.
    """
    hooks = ("methods", "patterns", "shrink_methods", "allocations", "recoveries")
    installed = listed(*(f"apt_{hook}" for hook in hooks))
    uses = {
        "columns": "shrink: groups", "groups": "shrink: groups", "experts": "shrink: experts",
        "blocks": "shrink: blocks",
    }  # fmt: skip
    use_order = list(dict.fromkeys(uses.values()))
    defaults = {
        installed.default_method().name,
        AUTO,
        installed.default_shrink_method("groups").name,
        installed.default_shrink_method("experts").name,
        installed.default_shrink_method("blocks").name,
    }

    def by_use(spec: Any) -> int:
        return use_order.index(uses[spec.chooses])

    specs: list[tuple[str, Any, Any]] = (
        [("prune", spec, installed.methods) for spec in _ranked(installed.methods)]
        + [("prune: pattern", spec, installed.patterns) for spec in installed.pattern_kinds()]
        + [
            (uses[spec.chooses], spec, installed.shrink_methods)
            for spec in sorted(_ranked(installed.shrink_methods), key=by_use)
        ]
    )
    allocations = installed.allocations
    specs += [("prune: allocation", spec, allocations) for spec in allocations.specs.values()]
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
    """The specs of a catalog, from the highest rank to the lowest."""
    return sorted(catalog.specs.values(), key=lambda spec: -spec.rank)


def plugins(printing: PrintingOptions) -> None:
    """List the installed plugins.

    Each one is listed with its specs, and with the error if it did not load.
    """
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
