"""``apt check``."""

import typer


def check(
    adapter: str = typer.Argument(help="The adapter's name, as in: apt adapters."),
    model: str | None = typer.Argument(
        None, help="A model to check it with; by default its own example or embedded model."
    ),
) -> None:
    """Check that an adapter is right; exit status 1 where it is not.

    For example: apt check llama
    """
    from apt.cli.output import out, table
    from apt.plugins import registry
    from apt.testing.checks import check_adapter
    from apt.testing.example import subject

    found = subject(registry(), adapter, model)
    outcomes = check_adapter(found.adapter, found.model, found.tokens)
    made = table("check", "", "what it looks at")
    for outcome in outcomes:
        made.add_row(outcome.name, "failed" if outcome.problem else "ok", outcome.summary)
    out.print(made)
    failed = [outcome for outcome in outcomes if outcome.problem]
    for outcome in failed:
        out.print(f"{outcome.name}: {outcome.problem}", markup=False)
    out.print(f"{adapter}: {len(outcomes) - len(failed)} of {len(outcomes)} checks hold")
    if failed:
        raise typer.Exit(1)
