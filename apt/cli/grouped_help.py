"""Help texts that list the options of a command in groups."""

from typing import Any

from typer.core import TyperArgument, TyperCommand

_REST = "Options"


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
        rest = groups.pop(_REST, [])
        if len(rest) > 1 or len(groups) < 3:
            super().format_options(ctx, formatter)
            return
        for name, lines in [*groups.items(), (_REST, rest)]:
            if lines:
                with formatter.section(name):
                    formatter.write_dl(lines)


def _group(parameter: Any) -> str:
    if isinstance(parameter, TyperArgument):
        return "Arguments"
    return getattr(parameter, "rich_help_panel", None) or _REST
