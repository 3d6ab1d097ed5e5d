"""Listings: the same rows as a table for people, or as JSON for programs."""

from collections.abc import Sequence


def show_rows(rows: Sequence[dict[str, str]], *, as_json: bool) -> None:
    """Print rows that have the same keys, which are the table's columns."""
    from apt.cli.output import show, show_json, table

    if as_json:
        show_json(rows)
        return
    made = table(*(rows[0] if rows else ()))
    for row in rows:
        made.add_row(*row.values())
    show(made)
