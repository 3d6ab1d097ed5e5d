"""The group of all subcommands. An error of usage and an interruption are one line each.

A subcommand is imported when it is called or when its help is shown. The list of all subcommands
shows their summaries.
"""

import warnings
from collections.abc import Mapping
from textwrap import shorten
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

from apt.cli.interruptions import interrupted
from apt.errors import AptError
from apt.plugin.commands import MACHINE, MODELS, OWN
from apt.plugin.specs import CommandSpec

HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}
_OTHER_OPTIONS = "Options"
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

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of all subcommands, in the order of the help."""
        return list(_command_specs())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A subcommand.

        Raises:
            AptError: there is no subcommand of this name, or it cannot be imported.
        """
        builtin = {spec.name: spec for spec in OWN}
        if cmd_name in builtin:
            return _typer_command(builtin[cmd_name])
        if ctx is not None and ctx.resilient_parsing and cmd_name not in _command_specs():
            return None  # an unfinished word, which a shell completes
        return _plugin_command(cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the summaries of all subcommands."""
        summaries = {name: spec.summary for name, spec in _command_specs().items()}
        width = formatter.width - 6 - max(map(len, summaries))
        with formatter.section("Commands"):
            formatter.write_dl(
                [
                    (name, shorten(text, width, placeholder="..."))
                    for name, text in summaries.items()
                ]
            )


def _command_specs() -> Mapping[str, CommandSpec]:
    """The specs of all subcommands. An error in the plugins is a warning."""
    from apt.plugin.registry import listed_commands

    try:
        specs = list(listed_commands().specs.values())
    except AptError as error:
        warnings.warn(f"plugin failed to load: {error}", stacklevel=2)
        specs = []
    others = [spec for spec in specs if spec not in OWN]
    return {spec.name: spec for spec in (*MODELS, *others, *MACHINE)}


def _plugin_command(name: str) -> Any:
    from apt.plugin.registry import listed_commands, registry

    commands = listed_commands()
    if name not in commands.specs:  # a module that is not in the list may have it
        commands = registry().commands
    spec = commands.get(name)
    try:
        return _typer_command(spec)
    except AptError as error:
        distribution = commands.origins[spec.name].distribution
        raise AptError(f"{distribution}: {error.message}", error.hint) from error


def _typer_command(spec: CommandSpec) -> Any:
    """The command of typer for the function of a spec."""
    from apt.cli.from_options import command

    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    with spec.loading():
        function = command(spec.load())
        app.command(spec.name, cls=GroupedHelp, context_settings=HELP_OPTIONS)(function)
        return typer.main.get_command(app)


class GroupedHelp(TyperCommand):
    """A command whose options are grouped by ``rich_help_panel``, in the order of declaration.

    They are grouped if each of them has a group, and there are several groups.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each group; ``--help`` comes last."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (line := parameter.get_help_record(ctx)) is not None:
                groups.setdefault(_group(parameter), []).append(line)
        others = groups.pop(_OTHER_OPTIONS, [])
        if len(others) > 1 or len(groups) < 3:
            super().format_options(ctx, formatter)
            return
        for name, lines in [*groups.items(), (_OTHER_OPTIONS, others)]:
            if lines:
                with formatter.section(name):
                    formatter.write_dl(lines)


def _group(parameter: Any) -> str:
    if isinstance(parameter, TyperArgument):
        return "Arguments"
    return getattr(parameter, "rich_help_panel", None) or _OTHER_OPTIONS


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
        raise AptError(message, f"see {command} --help") from error
    if isinstance(status, int) and status:
        raise SystemExit(status)
