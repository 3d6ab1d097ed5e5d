"""Subcommands of plugins: listed without their code, loaded when they are called."""

import inspect
import subprocess
import sys

import pytest

from apt.errors import AptError
from apt.hookspecs import CommandSpec
from apt.plugin.commands import OWN
from apt.plugin.registry import load_registry, registry
from tests.helpers.commands import commands

PLUGIN = '''"""A command beside one that does not import, and one that typer does not understand."""

import typer

from apt.errors import AptError
from apt.hookspecs import CommandSpec, hookimpl


def count(words: list[str], most: int = typer.Option(9, "--most", help="The largest count.")):
    """Count words.

    They are separated by blanks.
    """
    if len(words) > most:
        raise AptError(f"{len(words)} words are too many", options=("most",))
    typer.echo(len(words))


def odd(what: "Unknown"):
    """A type that is not defined."""


@hookimpl
def apt_commands():
    return [
        CommandSpec("count", "Count words.", "counting:count"),
        CommandSpec("lost", "Its module is missing.", "no_such_module:run"),
        CommandSpec("odd", "Its parameters are odd.", "counting:odd"),
    ]
'''
HEAVY = '''"""A plugin without a command, which must not be imported for the list of commands."""

import torch

from apt.hookspecs import AdapterSpec, hookimpl


@hookimpl
def apt_adapters():
    return []
'''


METHODS = """
from apt.hookspecs import MethodSpec, hookimpl


@hookimpl
def apt_methods():
    return [MethodSpec("mine", "Mine", "counting:mine")]
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install a module as a distribution with an entry point of its name."""

    def install(module, source):
        folder = tmp_path / "site"
        info = folder / f"{module}-1.2.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[apt]\n{module} = {module}\n")
        if str(folder) not in sys.path:
            monkeypatch.syspath_prepend(folder)
        registry.cache_clear()

    yield install
    monkeypatch.undo()
    registry.cache_clear()
    for module in ("counting", "counted", "heavy"):
        sys.modules.pop(module, None)


def test_summaries_equal_the_first_sentence_of_the_help():
    specs = {**registry().commands.specs, **{spec.name: spec for spec in OWN}}
    for name, command in commands().items():
        first = " ".join(inspect.cleandoc(command.help).partition("\n\n")[0].split())
        assert first == specs[name].summary, name


def test_command_of_a_plugin_runs_and_has_help(installed, apt):
    installed("counting", PLUGIN)
    assert apt("count", "a", "b", "c").out == "3\n"
    shown = apt("count", "--help").out
    assert "They are separated by blanks." in shown
    assert "The largest count." in shown
    refused = apt("count", "a", "b", "--most", 1)
    assert refused.code == 2
    assert refused.err == "apt: 2 words are too many (--most)\n"
    assert "see apt count --help" in apt("count", "a", "--most", "x").err


def test_help_lists_plugin_commands_between_those_of_apt(installed, apt):
    installed("counting", PLUGIN)
    lines = [
        line.split()[0] for line in apt("--help").out.split("Commands:\n")[1].splitlines()[:-2]
    ]
    assert lines[0] == "prune"
    assert lines.index("convert") < lines.index("count") < lines.index("doctor")
    assert "count" in apt("plugins").out
    assert apt("cuont").err == "apt: no command 'cuont'; did you mean 'count'?\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lost", "no_such_module:run of 'lost' does not load: No module named 'no_such_module'"),
        ("odd", "counting:odd of 'odd' does not load: name 'Unknown' is not"),
    ],
)
def test_command_that_does_not_load_is_an_error_with_its_distribution(
    installed, apt, name, message
):
    installed("counting", PLUGIN)
    ran = apt(name, "x")
    assert ran.code == 2
    assert ran.err.startswith(f"apt: counting 1.2: {message}")
    assert ran.err.count("\n") == 1
    assert name in apt("--help").out  # which does not load it


def test_help_imports_no_plugin_without_commands(installed, apt):
    installed("counting", PLUGIN)
    installed("heavy", HEAVY)
    assert "  count " in apt("--help").out
    assert "heavy" not in sys.modules


def test_list_of_methods_imports_no_plugin_without_methods(installed, apt):
    installed("heavy", HEAVY)
    installed("counting", METHODS)
    assert "\nmine " in apt("methods").out
    assert "heavy" not in sys.modules


def test_list_of_methods_includes_imported_hooks(installed, apt, tmp_path):
    installed("counting", "from counted import *\n")
    (tmp_path / "site" / "counted.py").write_text(METHODS)
    assert "\nmine " in apt("methods").out


def test_broken_plugin_with_commands_is_one_warning(installed, apt):
    installed("counting", PLUGIN + "\n1 / 0\n")
    shown = apt("--help")
    assert shown.code == 0
    warning = "apt: warning: plugin failed to load: counting 1.2: ZeroDivisionError: division by"
    assert shown.err.startswith(warning)
    assert "  eval " in shown.out
    missing = apt("count", "x")
    assert missing.err.count(warning) == 1
    assert "(plugins that failed to load: counting 1.2: ZeroDivisionError" in missing.err


def test_plugin_command_with_a_name_of_apt_is_refused(installed, apt):
    installed("counting", PLUGIN.replace('"count", ', '"prune", '))
    shown = apt("--help")
    assert shown.code == 0
    assert "command 'prune' comes from apt-prune and counting 1.2; uninstall one" in shown.err
    assert apt("prune", "--help").out.startswith("Usage: apt prune")
    refused = apt("adapters")
    assert refused.code == 2
    assert "command 'prune' comes from apt-prune and counting 1.2" in refused.err


def test_two_plugins_with_one_command_are_refused(entry):
    points = [
        entry(name, apt_commands=lambda: [CommandSpec("go", "Go.", "x:y")]) for name in ("a", "b")
    ]
    with pytest.raises(AptError, match=r"command 'go' comes from a 1\.2 and b 1\.2"):
        load_registry(points)


@pytest.mark.parametrize(("disable", "known"), [("*", True), ("lab", False), ("apt-prune", False)])
def test_disabling_an_entry_point_of_apt_removes_its_commands(apt, monkeypatch, disable, known):
    monkeypatch.setenv("APT_DISABLE_PLUGINS", disable)
    registry.cache_clear()
    ran = apt("eval", "--help")
    assert (ran.code == 0) is known
    assert ("APT_DISABLE_PLUGINS leaves out apt-prune" in ran.err) is not known
    assert ("  bench " in apt("--help").out) is known
    monkeypatch.undo()
    registry.cache_clear()


def test_shell_completes_commands_of_plugins():
    environment = {
        "_APT_PRUNE_COMPLETE": "complete_bash", "COMP_WORDS": "apt-prune co", "COMP_CWORD": "1",
        "PATH": "/usr/bin", "PYTHONPATH": ":".join(sys.path),
    }  # fmt: skip
    code = "import sys, apt.cli; sys.argv = ['/usr/bin/apt-prune']; apt.cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout.split() == ["convert", "compare"], done.stderr
