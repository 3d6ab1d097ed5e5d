"""Commands from classes of options: the flags, their help, and the objects that a command gets."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer

from apt.errors import AptError
from apt.locations.paths import expanded
from apt.options import (
    PANELS,
    TEXT,
    ConfigOptions,
    Declared,
    Options,
    PrintingOptions,
    read_options,
    warn_renamed,
    write_options,
)


def command(act: Callable[..., None]) -> Callable[..., None]:
    """The function for typer of a command whose parameters are classes of options.

    The command has a flag for each option of each class, and ``--config`` and ``--save-config``.
    The docstring of ``act`` is its help.

    Args:
        act: the command. Each parameter is annotated with a class of options; a function with
            other parameters is returned as it is.
    """
    hints = get_type_hints(act)
    kinds: dict[str, Any] = {name: hints.get(name) for name in inspect.signature(act).parameters}
    if not kinds or not all(isinstance(k, type) and issubclass(k, Options) for k in kinds.values()):
        return act
    saves = ConfigOptions not in kinds.values() and set(kinds.values()) != {PrintingOptions}
    every = [*kinds.values(), *([ConfigOptions] if saves else [])]
    known = {one.name: one for kind in every for one in kind.OPTIONS}
    order = sorted(known.values(), key=lambda one: _panel(one.option.panel))
    shown = [parameter for one in order for parameter in _parameters(one)]
    if "config" in known:
        config = next(parameter for parameter in shown if parameter.name == "config")
        config.default.callback = _loading(every)
        config.default.is_eager = True

    def run(context: typer.Context, **given: Any) -> None:
        values = context.meta.get(_IN_FILE, {}) | _given(context, given, order)
        made = {name: _made(kind, values) for name, kind in kinds.items()}
        for options in made.values():
            options.check()
        if saves and values.get("save_config") is not None:
            run_options = next(iter(made.values()))
            write_options(expanded(values["save_config"]), run_options, _places(run_options))
        act(**made)

    first = inspect.Parameter("context", _ANY, annotation=typer.Context)
    run.__signature__ = inspect.Signature([first, *shown])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (first, *shown)}
    run.__doc__, run.__name__ = act.__doc__, act.__name__
    return run


def _loading(kinds: list[type[Options]]) -> Callable[..., Path | None]:
    """The callback of ``--config``. Required options of the file become defaults for typer."""
    required = [one.name for kind in kinds for one in kind.OPTIONS if one.default is MISSING]

    def load(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None:
            values = context.meta[_IN_FILE] = read_options(expanded(path), kinds)
            context.default_map = {n: _text(values[n]) for n in required if n in values}
        return path

    return load


def _text(value: Any) -> Any:
    return list(map(str, value)) if isinstance(value, tuple) else str(value)


def _places(options: Options) -> list[Path]:
    """The local files and directories that options name."""
    named = [getattr(options, one.name) for one in options.OPTIONS if one.option.place]
    names = (name for value in named for name in (value if isinstance(value, tuple) else [value]))
    return [path for name in names if name and (path := expanded(name)).exists()]


_IN_FILE = "apt.options in a file"
_ANY = inspect.Parameter.KEYWORD_ONLY


def _panel(name: str) -> float:
    return PANELS.index(name) if name in PANELS else PANELS.index(TEXT) + 0.5


def _made(kind: type[Options], values: dict[str, Any]) -> Options:
    return kind(**{one.name: values[one.name] for one in kind.OPTIONS if one.name in values})


def _parameters(one: Declared) -> Iterator[inspect.Parameter]:
    """The parameters of the command for an option: one, or one for each switch or old name."""
    declaration = one.option
    for flag, _, said in declaration.switches:
        yield _flag(_name_of(flag), flag, False, said, declaration.panel)
    if declaration.switches:
        return
    yes, no = one.flags
    kind, default = _kind(one), ... if one.default is MISSING else one.default or None
    if declaration.positional:
        info: Any = typer.Argument(
            default, help=declaration.help, metavar=declaration.metavar or one.name.upper(),
            show_default=False,
        )  # fmt: skip
        annotation = kind if default is ... else kind | None
        yield inspect.Parameter(one.name, _ANY, default=info, annotation=annotation)
        return
    if one.kind is bool:
        flag = f"{yes}/{no}" if yes and no else yes or no
        value = default if yes else False
        yield _flag(one.name, flag, value, declaration.help, declaration.panel)
        return
    yield _valued(one, one.name, (yes, *filter(None, [declaration.short])), kind, default)
    if declaration.formerly:
        old = f"--{declaration.formerly.replace('_', '-')}"
        yield _valued(one, declaration.formerly, (old,), kind, None, hidden=True)


def _flag(name: str, flag: str, default: Any, said: str, panel: str) -> inspect.Parameter:
    info = typer.Option(default, flag, help=said, rich_help_panel=panel or None)
    return inspect.Parameter(name, _ANY, default=info, annotation=bool | None)


def _valued(
    one: Declared,
    name: str,
    flags: tuple[str, ...],
    kind: Any,
    default: Any,
    *,
    hidden: bool = False,
) -> inspect.Parameter:
    shown = one.option.text(default) if default and one.option.read else default
    if one.repeatable:
        shown = list(shown or ())
    info = typer.Option(
        shown, *flags, help=one.option.help, metavar=one.option.metavar, hidden=hidden,
        rich_help_panel=one.option.panel or None, show_default=not one.repeatable or bool(shown),
    )  # fmt: skip
    annotation = kind if shown is ... else kind | None
    return inspect.Parameter(name, _ANY, default=info, annotation=annotation)


def _kind(one: Declared) -> Any:
    """The type by which typer reads the value."""
    if one.repeatable:
        plain = get_origin(one.kind) is tuple and one.option.read is None
        item = get_args(one.kind)[0] if plain else str
        return list[item]  # type: ignore[valid-type]
    if one.option.read is not None or get_origin(one.kind) is Literal or str in one.kinds:
        return str
    return one.kind


def _name_of(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _given(context: typer.Context, given: dict[str, Any], order: list[Declared]) -> dict[str, Any]:
    """The values of the options on the command line, by the names of the fields."""
    present = {
        name: value
        for name, value in given.items()
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    values: dict[str, Any] = {}
    for one in order:
        former = one.option.formerly
        if former in present:
            warn_renamed(f"--{former.replace('_', '-')}", one.flags[0])
            values[one.name] = _value(one, present[former])
        if one.option.switches:
            chosen = [s for s in one.option.switches if present.get(_name_of(s[0]))]
            if len(chosen) > 1:
                flags = [flag for flag, _, _ in one.option.switches]
                every = f"{', '.join(flags[:-1])} and {flags[-1]}"
                raise AptError(f"{every} exclude each other", "choose one")
            values |= {one.name: chosen[0][1]} if chosen else {}
        elif one.name in present:
            values[one.name] = _value(one, present[one.name])
    return values


def _value(one: Declared, value: Any) -> Any:
    """The value of an option, from what typer has read."""
    if one.kind is bool:
        return value if one.flags[0] else not value
    if one.option.read is not None:
        return one.option.read(value)
    return tuple(value) if one.repeatable else value
