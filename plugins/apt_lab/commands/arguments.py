"""Options that several commands have in common, and the parsing of their values."""

from collections.abc import Sequence

import typer

from apt.cli.arguments import parts
from apt.errors import AptError

TASKS = typer.Option(
    [], "--tasks", metavar="LIST", rich_help_panel="Tasks",
    help="Tasks of lm-evaluation-harness, or their YAML files, separated by commas. local stands "
    "for six multiple-choice sets that need no network.",
)  # fmt: skip
LIMIT = typer.Option(
    None, "--limit", metavar="N", rich_help_panel="Tasks",
    help="Questions of each task; by default all.",
)  # fmt: skip


def check_limit(limit: int | None, tasks: Sequence[str]) -> None:
    """Raise for a number of questions below 1, or without tasks."""
    if limit is not None and limit < 1:
        raise AptError(f"limit is {limit}; it must be at least 1", "", ("limit",))
    if limit is not None and not tasks:
        raise AptError(
            "the limit counts the questions of tasks, and there are none",
            "name tasks, or leave it out",
            ("limit", "tasks"),
        )


def read_tasks(given: list[str], *, trust_remote_code: bool) -> list[str]:
    """The names of tasks in lists that are separated by commas.

    Raises:
        AptError: a task is not known, what it needs is not installed, or it would run code.
    """
    if not given:
        return []
    from apt_lab.tasks.harness import check_tasks

    names = [name for text in given for name in parts(text, "--tasks")]
    return check_tasks(names, trust_remote_code=trust_remote_code)
