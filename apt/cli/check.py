"""``apt-prune check``."""

import warnings
from typing import TYPE_CHECKING

import typer

from apt.cli import arguments as args

if TYPE_CHECKING:
    from apt.testing import Outcome, Subject


def check(
    adapter: str = typer.Argument(help="The adapter's name, as in: apt-prune adapters."),
    model: str | None = typer.Argument(
        None, help="A model to check it with; by default its own example or embedded model."
    ),
    as_json: bool = args.JSON,
) -> None:
    """Check that an adapter is right.

    Exit status 1 where a check fails, 2 where there is nothing to check: the adapter or its example
    cannot be made, or the model is none for it.

    For example: apt-prune check llama
    """
    from apt.conformance.outcomes import outcomes

    found = list(outcomes(_subject(adapter, model)))
    _show(adapter, found, as_json=as_json)
    if any(outcome.problem for outcome in found):
        raise typer.Exit(1)


def _show(adapter: str, found: "list[Outcome]", *, as_json: bool) -> None:
    """Print what came of every check."""
    from apt.cli.output import out, show, show_json, table
    from apt.conformance.outcomes import told

    states = {
        outcome.name: "not run" if outcome.kept_by else "failed" if outcome.problem else "ok"
        for outcome in found
    }
    holding = list(states.values()).count("ok")
    if as_json:
        show_json(
            {"adapter": adapter, "checks": states, "problems": told(found), "holding": holding}
        )
        return
    made = table("check", "", "what it looks at")
    for outcome in found:
        made.add_row(outcome.name, states[outcome.name], outcome.summary)
    show(made)
    for line in told(found):
        out.print(line, markup=False)
    out.print(f"{adapter}: {holding} of {len(found)} checks hold")


def _subject(adapter: str, model: str | None) -> "Subject":
    """What to check; of plugins that do not load, the error says more than their warnings."""
    from apt.cli.output import notice
    from apt.cli.streams import program
    from apt.plugin.registry import registry
    from apt.testing.example import subject

    with warnings.catch_warnings(record=True) as told:
        found = registry()
    made = subject(found, adapter, model)
    for warning in told:
        notice(f"{program()}: warning: {warning.message}")
    return made
