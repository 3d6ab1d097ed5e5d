"""``apt-prune check``."""

import warnings
from typing import TYPE_CHECKING

import typer

from apt.options import CheckRun, PrintingOptions

if TYPE_CHECKING:
    from apt.testing import Outcome, Subject


def check(run: CheckRun, printing: PrintingOptions) -> None:
    """Check an adapter.

    The exit status is 1 if a check fails. It is 2 if no check can run: the adapter or its example
    cannot be made, or the adapter does not fit the model.

    For example: apt-prune check llama
    """
    from apt.conformance.outcomes import outcomes

    results = list(outcomes(_subject(run.adapter, run.model)))
    _show(run.adapter, results, as_json=printing.as_json)
    if any(outcome.problem for outcome in results):
        raise typer.Exit(1)


def _show(adapter: str, results: "list[Outcome]", *, as_json: bool) -> None:
    """Print the outcome of every check."""
    from apt.cli.output import say, show, show_json, table
    from apt.conformance.outcomes import fault_lines

    states = {
        outcome.name: "not run" if outcome.kept_by else "failed" if outcome.problem else "ok"
        for outcome in results
    }
    passed = list(states.values()).count("ok")
    if as_json:
        show_json(
            {
                "adapter": adapter,
                "checks": states,
                "problems": fault_lines(results),
                "holding": passed,
            }
        )
        return
    check_table = table("check", "", "meaning")
    for outcome in results:
        check_table.add_row(outcome.name, states[outcome.name], outcome.summary)
    show(check_table)
    for line in fault_lines(results):
        say(line)
    say(f"{adapter}: {passed} of {len(results)} checks hold")


def _subject(adapter: str, model: str | None) -> "Subject":
    """The subject of the checks.

    Warnings about plugins that do not load are printed once the subject is there. If it cannot be
    made, the error names these plugins, with more detail.
    """
    from apt.cli.output import notice
    from apt.cli.streams import program
    from apt.plugin.registry import registry
    from apt.testing.example import subject

    with warnings.catch_warnings(record=True) as caught:
        plugins = registry()
    result = subject(plugins, adapter, model)
    for warning in caught:
        notice(f"{program()}: warning: {warning.message}")
    return result
