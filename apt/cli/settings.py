"""Options of a command in a TOML file: ``--config`` reads them, ``--save-config`` writes them.

The keys are the names of the options without their leading dashes, and ``model``. An option on the
command line takes precedence over the file.
"""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from apt.errors import AptError, first_line, unknown
from apt.files.writing import check_file, write_file

# Options that are not settings of a run; and those that are not written: secret, or for one call.
_NO_SETTINGS = ("config", "save_config", "dry_run", "as_json", "help")
_NEVER_WRITTEN = (*_NO_SETTINGS, "token", "resume", "overwrite")


@dataclass(frozen=True)
class _Setting:
    """An option that a file may set.

    Attributes:
        key: its name in a file.
        name: the name of the parameter.
        flag: True if its value is true or false.
        repeatable: True if its value may be a list.
        value: for a flag, the value of the parameter if the file has true.
    """

    key: str
    name: str
    flag: bool
    repeatable: bool
    value: bool = True


def load(context: typer.Context, path: Path | None) -> Path | None:
    """The callback of ``--config``: the file's options become the defaults of the command line.

    Raises:
        AptError: the file cannot be read, or has an unknown key.
    """
    if path is not None:
        known = {setting.key: setting for setting in _settings(context)}
        context.default_map = {known[k].name: v for k, v in _checked(path, known).items()}
    return path


def save(
    context: typer.Context, path: Path, chosen: Mapping[str, Any], inputs: Sequence[Path]
) -> None:
    """Write the options of this command, with the ``chosen`` defaults.

    Args:
        context: the command.
        path: the file to write.
        chosen: the defaults that were chosen.
        inputs: what the command reads; the file must not be inside.

    Raises:
        AptError: the file exists with other content, or cannot be written.
    """
    import tomli_w

    text = tomli_w.dumps(dict(_set_options(context, chosen)))
    try:
        same = path.is_file() and path.read_text(encoding="utf-8") == text
    except (OSError, UnicodeError):
        same = False
    check_file(path, overwrite=same or None, inputs=inputs, options=("save_config",))
    write_file(path, text, overwrite=same)


def _set_options(context: typer.Context, chosen: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The options with a value that is not the default, by their keys."""
    defaults = {parameter.name: parameter.default for parameter in context.command.params}
    for setting in _settings(context):
        value = chosen.get(setting.name, context.params.get(setting.name))
        if setting.name in _NEVER_WRITTEN or value is None or value in ([], ()):
            continue
        if setting.flag and (value is not setting.value or value is defaults[setting.name]):
            continue
        yield setting.key, (True if setting.flag else _toml_value(value))


def _toml_value(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [str(item) for item in value]
    return value if isinstance(value, int | float) else str(value)


def _settings(context: typer.Context) -> Iterator[_Setting]:
    """The settings of a command. An option with two flags, for yes and for no, is two settings."""
    for parameter in context.command.params:
        name = str(parameter.name)
        if name in _NO_SETTINGS:
            continue
        flag, repeatable = bool(getattr(parameter, "is_flag", False)), bool(parameter.multiple)
        yield _Setting(_key(parameter.opts), name, flag, repeatable)
        if parameter.secondary_opts:
            yield _Setting(_key(parameter.secondary_opts), name, flag, repeatable, False)


def _key(spellings: list[str]) -> str:
    return max(spellings, key=len).lstrip("-")


def _checked(path: Path, known: Mapping[str, _Setting]) -> dict[str, Any]:
    """The values of a file by key, each of a type that its option accepts."""
    found = {}
    for key, value in _read(path).items():
        key = key.replace("_", "-")
        if key not in known:
            raise unknown("option", key, known, f" ({path})")
        found[key] = _value(path, known[key], value)
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows adds a BOM
    except (OSError, ValueError, RecursionError) as error:
        raise AptError(
            f"{path} cannot be read: {first_line(error)}", 'write lines such as pattern = "2:4"'
        ) from error


def _value(path: Path, setting: _Setting, value: Any) -> Any:
    if setting.flag:
        if not isinstance(value, bool):
            raise AptError(f"{setting.key} in {path} is neither true nor false")
        return value is setting.value
    items = value if isinstance(value, list) and setting.repeatable else [value]
    if any(isinstance(item, bool) or not isinstance(item, str | int | float) for item in items):
        kind = "a list of strings" if setting.repeatable else "a string or a number"
        raise AptError(f"{setting.key} in {path} is not {kind}")
    return [str(item) for item in items] if setting.repeatable else str(value)
