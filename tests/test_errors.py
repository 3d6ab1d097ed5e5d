"""Errors of the library name options as in Python; only the command line names flags."""

import ast
import re
from collections.abc import Iterator

from typer.main import get_command

from apt.cli import app
from apt.options import PruneRun, flags_of
from tests.helpers import ROOT

FILES = [
    path
    for root in ("apt", "adapters", "plugins")
    for path in sorted((ROOT / root).rglob("*.py"))
    if "tests" not in path.relative_to(ROOT).parts
]
# Of commands, of the help of options, and of what writes a command.
WITH_FLAGS = ("apt/cli", "apt/options", "plugins/apt_lab/commands", "plugins/apt_lab/options.py",
              "plugins/apt_lab/reproduction.py")  # fmt: skip
COMMANDS = [ROOT / name for name in WITH_FLAGS]
LIBRARY = [path for path in FILES if not any(map(path.is_relative_to, COMMANDS))]
# Functions with an argument for options, and its position; `add_hint` takes all further ones.
POSITIONS = {"AptError": 2, "NotStoredError": 2, "write_errors": 2, "cannot_write": 3}
OF_PROGRAMS = {"other_tokens"}  # an argument of `apt.prune` alone; commands have no such option
FLAG = re.compile(r"(?<![\w-])--[a-z]")


def strings(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def constants(tree: ast.Module) -> dict[str, ast.expr]:
    """The constants of a module by name."""
    return {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def named_options(tree: ast.Module) -> Iterator[str]:
    """The options that the errors of a module name, if they are constants."""
    known = constants(tree)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = getattr(call.func, "id", getattr(call.func, "attr", ""))
        given = [keyword.value for keyword in call.keywords if keyword.arg == "options"]
        if name == "add_hint":
            given += call.args[1:]
        elif name in POSITIONS:
            given += call.args[POSITIONS[name] :][:1]
        else:
            continue
        for expression in given:
            yield from strings(known.get(getattr(expression, "id", ""), expression))


def flags() -> set[str]:
    """The flags of `apt` and of the commands that run a model, without former names."""
    program = get_command(app)
    return {
        flag
        for command in program.list_commands(None)
        for parameter in (*program.params, *program.get_command(None, command).params)
        if not getattr(parameter, "hidden", False)
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }


def test_each_option_named_by_an_error_has_a_flag():
    named = {one.name for one in PruneRun.OPTIONS}  # these are named by a variable
    for path in FILES:
        named |= set(named_options(ast.parse(path.read_text(encoding="utf-8"))))
    assert {"output", "overwrite", "resume", "dtype", "only", "adapter", "samples"} <= named
    known = flags()
    for name in sorted(named - OF_PROGRAMS):
        for flag in re.split("/|, ", flags_of([name]).strip(" ()")):
            assert flag in known or flag.isupper(), name


def docstrings(tree: ast.Module) -> set[int]:
    """The docstrings of a module, by the identity of their nodes."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, owners)]
    return {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}


def test_messages_of_the_library_name_no_flag():
    found = []
    for path in set(LIBRARY) - {ROOT / "apt/testing/plugin.py"}:  # its flags are those of pytest
        tree = ast.parse(path.read_text(encoding="utf-8"))
        skipped = docstrings(tree)
        for node in ast.walk(tree):
            text = getattr(node, "value", None) if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and id(node) not in skipped and FLAG.search(text):
                found += [(path, node.lineno, text)] * ("pip install" not in text)
    assert not found
