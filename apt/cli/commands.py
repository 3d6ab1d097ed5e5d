"""The group of all subcommands: its errors of usage and its interruptions are single lines."""

from typing import Any

import typer
from typer.core import TyperGroup

from apt.cli.interruptions import interrupted
from apt.errors import AptError

# typer has a copy of click in new versions, and click itself in older ones.
_UsageError: Any = typer.BadParameter.__mro__[1]


class Commands(TyperGroup):
    """The subcommands."""

    def invoke(self, ctx: Any) -> Any:
        """Run a subcommand."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise interrupted(error) from None


def run(app: typer.Typer, arguments: list[str], program: str) -> None:
    """Run the command line.

    Raises:
        AptError: it cannot be read.
        SystemExit: its exit status is not 0.
    """
    try:
        status = app(args=arguments, prog_name=program, standalone_mode=False)
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else program
        message = " ".join(error.format_message().split()).rstrip(".")
        raise AptError(message + _in_file(error), f"see {command} --help") from error
    if isinstance(status, int) and status:
        raise SystemExit(status)


def _in_file(error: Any) -> str:
    """The file of ``--config``, if the wrong value of an option is there."""
    context, parameter = error.ctx, getattr(error, "param", None)
    if context is None or parameter is None:
        return ""
    source = context.get_parameter_source(parameter.name)
    from_file = getattr(source, "name", "") == "DEFAULT_MAP"
    return f" (in {context.params.get('config')})" if from_file else ""
