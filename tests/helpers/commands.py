"""The commands whose options are declared: their classes, and options as words for a shell."""

import inspect
from dataclasses import MISSING
from functools import cache
from typing import get_args, get_type_hints

import typer
from typer.main import get_command

from apt.cli import app
from apt.cli.from_options import command
from apt.options import FitRun, Options
from apt.plugin.registry import listed_commands


def commands():
    """All subcommands, as objects of typer."""
    program = get_command(app)
    return {name: program.get_command(None, name) for name in program.list_commands(None)}


@cache
def declared():
    """The functions of all commands that take classes of options, by name."""
    known = {spec.name: spec.load() for spec in listed_commands().specs.values()}
    return {name: act for name, act in known.items() if kinds_of(act)}


def kinds_of(act):
    """The classes of options of a command, by the names of its parameters."""
    hints = get_type_hints(act)
    kinds = {name: hints.get(name) for name in inspect.signature(act).parameters}
    all_declared = all(isinstance(k, type) and issubclass(k, Options) for k in kinds.values())
    return kinds if all_declared else {}


CHECKED = {FitRun: {"model": "given", "size": "1GB"}}
"""Values of options with a default that `check` of their class refuses."""


def needed_values(kind):
    """Values of the required options."""
    needed = [one for one in kind.OPTIONS if one.default is MISSING]
    return CHECKED.get(kind, {}) | {
        one.name: (get_args(one.kind)[0]("given"),) if one.repeatable else one.kind("given")
        for one in needed
    }


def words(kind, given):
    """The words of a command line that give options the values of a dictionary."""
    before, after = [], []
    for one in (one for one in kind.OPTIONS if one.name in given):
        value, (yes, no) = given[one.name], one.flags
        if one.option.switches:
            after += [flag for flag, meaning, _ in one.option.switches if meaning == value]
        elif one.kind is bool:
            after.append(yes if value else no)
        else:
            items = one.option.text(value) if one.repeatable and one.option.read else value
            items = list(items) if one.repeatable else [items]
            if one.option.positional:
                before += items
            else:
                after += [word for item in items for word in (yes, item)]
    return [*map(str, before), *map(str, after)]


@cache
def _parser(name):
    """The command line of a command that only records its arguments."""
    act, got = declared()[name], {}

    def take(**made):
        got.update(made)

    take.__signature__ = inspect.signature(act)
    take.__annotations__ = get_type_hints(act)
    program = typer.Typer(add_completion=False)
    program.command()(command(take))
    return get_command(program), got


def taken(name, arguments):
    """The arguments of a command for the words of a command line, by class."""
    parse, got = _parser(name)
    got.clear()
    parse(arguments, standalone_mode=False)
    return {type(options): options for options in got.values()}
