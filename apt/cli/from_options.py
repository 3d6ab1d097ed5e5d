"""Commands from classes of options: the flags, their help, and the instances for the command."""

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


def command(function: Callable[..., None]) -> Callable[..., None]:
    """The function for typer of a command whose parameters are classes of options.

    The command has a flag for each option of each class, and ``--config`` and ``--save-config``.
    The docstring of ``function`` is the help.

    Args:
        function: the command. Each parameter is annotated with a class of options. A function with
            other parameters is returned unchanged.
    """
    hints, names = get_type_hints(function), inspect.signature(function).parameters
    classes: dict[str, Any] = {name: hints.get(name) for name in names}
    if not classes or not all(map(_is_options_class, classes.values())):
        return function
    saves = ConfigOptions not in classes.values() and set(classes.values()) != {PrintingOptions}
    all_classes = [*classes.values(), *([ConfigOptions] if saves else [])]
    by_name = {declared.name: declared for cls in all_classes for declared in cls.OPTIONS}
    ordered = sorted(by_name.values(), key=lambda declared: _panel_index(declared.option.panel))
    parameters = [parameter for declared in ordered for parameter in _parameters(declared)]
    if "config" in by_name:
        config = next(parameter for parameter in parameters if parameter.name == "config")
        config.default.callback = _config_callback(all_classes)
        config.default.is_eager = True

    def run(context: typer.Context, **parsed: Any) -> None:
        values = context.meta.get(_FILE_VALUES, {}) | _command_line_values(context, parsed, ordered)
        instances = {name: _instance(cls, values) for name, cls in classes.items()}
        for options in instances.values():
            options.check()
        if saves and values.get("save_config") is not None:
            run_options = next(iter(instances.values()))
            write_options(expanded(values["save_config"]), run_options, _local_paths(run_options))
        function(**instances)

    parameters.insert(0, inspect.Parameter("context", _KEYWORD_ONLY, annotation=typer.Context))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__, run.__name__ = function.__doc__, function.__name__
    return run


def _is_options_class(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Options)


def _config_callback(classes: list[type[Options]]) -> Callable[..., Path | None]:
    """The callback of ``--config``. Required options of the file become defaults for typer."""
    options = [declared for cls in classes for declared in cls.OPTIONS]
    required = [declared.name for declared in options if declared.default is MISSING]

    def load(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None:
            values = context.meta[_FILE_VALUES] = read_options(expanded(path), classes)
            context.default_map = {n: _default_text(values[n]) for n in required if n in values}
        return path

    return load


def _default_text(value: Any) -> Any:
    return list(map(str, value)) if isinstance(value, tuple) else str(value)


def _local_paths(options: Options) -> list[Path]:
    """The local files and directories that options name."""
    names = [declared.name for declared in options.OPTIONS if declared.option.place]
    values = [getattr(options, name) for name in names]
    texts = (text for value in values for text in (value if isinstance(value, tuple) else [value]))
    return [path for text in texts if text and (path := expanded(text)).exists()]


_FILE_VALUES = "apt.options in a file"
_KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY


def _panel_index(name: str) -> float:
    return PANELS.index(name) if name in PANELS else PANELS.index(TEXT) + 0.5


def _instance(cls: type[Options], values: dict[str, Any]) -> Options:
    names = [declared.name for declared in cls.OPTIONS if declared.name in values]
    return cls(**{name: values[name] for name in names})


def _parameters(declared: Declared) -> Iterator[inspect.Parameter]:
    """The parameters of the command for an option: one for each flag, switch and former name."""
    declaration = declared.option
    for flag, _, help_text in declaration.switches:
        yield _flag_parameter(_parameter_name(flag), flag, False, help_text, declaration.panel)
    if declaration.switches:
        return
    yes, no = declared.flags
    kind = _typer_type(declared)
    default = ... if declared.default is MISSING else declared.default or None
    if declaration.positional:
        info: Any = typer.Argument(
            default, help=declaration.help, metavar=declaration.metavar or declared.name.upper(),
            show_default=False,
        )  # fmt: skip
        annotation = kind if default is ... else kind | None
        yield inspect.Parameter(declared.name, _KEYWORD_ONLY, default=info, annotation=annotation)
        return
    if declared.kind is bool:
        flag = f"{yes}/{no}" if yes and no else yes or no
        value = default if yes else False
        yield _flag_parameter(declared.name, flag, value, declaration.help, declaration.panel)
        return
    yield _value_parameter(
        declared, declared.name, (yes, *filter(None, [declaration.short])), kind, default
    )
    if declaration.formerly:
        old = f"--{declaration.formerly.replace('_', '-')}"
        yield _value_parameter(declared, declaration.formerly, (old,), kind, None, hidden=True)


def _flag_parameter(
    name: str, flag: str, default: Any, help_text: str, panel: str
) -> inspect.Parameter:
    info = typer.Option(default, flag, help=help_text, rich_help_panel=panel or None)
    return inspect.Parameter(name, _KEYWORD_ONLY, default=info, annotation=bool | None)


def _value_parameter(
    declared: Declared,
    name: str,
    flags: tuple[str, ...],
    kind: Any,
    default: Any,
    *,
    hidden: bool = False,
) -> inspect.Parameter:
    declaration = declared.option
    shown = declaration.text(default) if default and declaration.read else default
    if declared.repeatable:
        shown = list(shown or ())
    info = typer.Option(
        shown, *flags, help=declaration.help, metavar=declaration.metavar, hidden=hidden,
        rich_help_panel=declaration.panel or None,
        show_default=not declared.repeatable or bool(shown),
    )  # fmt: skip
    annotation = kind if shown is ... else kind | None
    return inspect.Parameter(name, _KEYWORD_ONLY, default=info, annotation=annotation)


def _typer_type(declared: Declared) -> Any:
    """The type with which typer reads the value."""
    if declared.repeatable:
        is_plain = get_origin(declared.kind) is tuple and declared.option.read is None
        item = get_args(declared.kind)[0] if is_plain else str
        return list[item]  # type: ignore[valid-type]
    if (
        declared.option.read is not None
        or get_origin(declared.kind) is Literal
        or str in declared.kinds
    ):
        return str
    return declared.kind


def _parameter_name(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _command_line_values(
    context: typer.Context, parsed: dict[str, Any], declarations: list[Declared]
) -> dict[str, Any]:
    """The values of the options on the command line, by the names of the fields."""
    present = {
        name: value
        for name, value in parsed.items()
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    values: dict[str, Any] = {}
    for declared in declarations:
        former = declared.option.formerly
        if former in present:
            warn_renamed(f"--{former.replace('_', '-')}", declared.flags[0])
            values[declared.name] = _value(declared, present[former])
        if declared.option.switches:
            chosen = [s for s in declared.option.switches if present.get(_parameter_name(s[0]))]
            if len(chosen) > 1:
                flags = [flag for flag, _, _ in declared.option.switches]
                flag_list = f"{', '.join(flags[:-1])} and {flags[-1]}"
                raise AptError(f"{flag_list} exclude each other", "choose one")
            values |= {declared.name: chosen[0][1]} if chosen else {}
        elif declared.name in present:
            values[declared.name] = _value(declared, present[declared.name])
    return values


def _value(declared: Declared, value: Any) -> Any:
    """The value of an option, from the value that typer has read."""
    if declared.kind is bool:
        return value if declared.flags[0] else not value
    if declared.option.read is not None:
        return declared.option.read(value)
    return tuple(value) if declared.repeatable else value
