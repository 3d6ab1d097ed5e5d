"""``apt-prune check``."""

import warnings
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from apt.testing import Subject


def check(
    adapter: str = typer.Argument(help="The adapter's name, as in: apt-prune adapters."),
    model: str | None = typer.Argument(
        None, help="A model to check it with; by default its own example or embedded model."
    ),
) -> None:
    """Check that an adapter is right.

    Exit status 1 where a check fails, 2 where there is nothing to check: the adapter or its example
    cannot be made, or the model is none for it.

    For example: apt-prune check llama
    """
    from apt.cli.output import out, table
    from apt.testing.outcomes import outcomes, told

    found = list(outcomes(_subject(adapter, model)))
    made = table("check", "", "what it looks at")
    for outcome in found:
        state = "not run" if outcome.kept_by else "failed" if outcome.problem else "ok"
        made.add_row(outcome.name, state, outcome.summary)
    out.print(made)
    for line in told(found):
        out.print(line, markup=False)
    holding = sum(not outcome.problem for outcome in found)
    out.print(f"{adapter}: {holding} of {len(found)} checks hold")
    if holding < len(found):
        raise typer.Exit(1)


def _subject(adapter: str, model: str | None) -> "Subject":
    """What to check; of plugins that do not load, the error says more than their warnings."""
    from apt.cli.output import notice
    from apt.plugins import registry
    from apt.testing.example import subject

    with warnings.catch_warnings(record=True) as told:
        found = registry()
    made = subject(found, adapter, model)
    for warning in told:
        notice(f"apt: warning: {warning.message}")
    return made
