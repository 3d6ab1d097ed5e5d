"""A hook of mkdocs: pages of the repository's root and the commands become pages of the site."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files
from typer.main import get_command

from apt.cli import app

ROOT = Path(__file__).parent.parent
OUTSIDE = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "plugins/apt_plugins/data/LICENSE.md": "data-license.md",
}
COMPLETION = ("install_completion", "show_completion")  # typer's own


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root."""
    for name, page in OUTSIDE.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Replace links between the root and the folder of the documents, and list the commands."""
    inside = page.file.src_uri not in OUTSIDE.values()

    def moved(match: re.Match[str]) -> str:
        path = match[1].removeprefix("../") if inside else match[1].removeprefix("docs/")
        return f"]({OUTSIDE.get(path, path)}"

    markdown = re.sub(r"\]\(((?:\.\./|docs/)?[\w./-]+\.(?:md|png))", moved, markdown)
    return "\n".join([markdown, *_commands()]) if page.file.src_uri == "cli.md" else markdown


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Make the empty corner of a table a cell: a header without text confuses screen readers."""
    return re.sub(r"<th([^>]*)></th>", r"<td\1></td>", html)


def _commands() -> Iterator[str]:
    """The help of each command as Markdown."""
    program: Any = get_command(app)
    context = typer.Context(program, info_name="apt-prune")
    yield "## All commands\n"
    yield from _tables(program, context)
    for name in program.list_commands(context):
        command = program.get_command(context, name)
        own = typer.Context(command, info_name=name, parent=context)
        yield f"## `{name}`\n\n{inspect.cleandoc(command.help)}\n"
        yield f"```text\n{command.get_usage(own).removeprefix('Usage: ')}\n```\n"
        yield from _tables(command, own)


def _tables(command: Any, context: typer.Context) -> Iterator[str]:
    """A table of options for each panel of the help."""
    panels: dict[str, list[str]] = {}
    for one in command.params:
        record = None if one.name in COMPLETION else one.get_help_record(context)
        if record is not None:
            flags, said = record[0], re.sub(r"([|*\[])", r"\\\1", record[1])
            rows = panels.setdefault(getattr(one, "rich_help_panel", None) or "", [])
            rows.append(f"| `{flags}` | {said} |")
    for title, rows in panels.items():
        yield f"**{title}**\n" if title else ""
        yield "\n".join(["| option | |", "| --- | --- |", *rows, ""])
