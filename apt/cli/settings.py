"""Options of a command in a TOML file: ``--config`` reads them, ``--save-config`` writes them.

Keys are the options' names without dashes in front, and ``model``. What is on the command line
counts more than what is in the file.
"""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from apt.errors import AptError, first_line, unknown

# What is about files of settings, about this call alone, or nobody's business.
_APART = ("config", "save_config", "dry_run", "as_json", "help")
_NEVER_WRITTEN = (*_APART, "token", "resume", "overwrite")


@dataclass(frozen=True)
class _Setting:
    """An option that a file may set.

    Attributes:
        key: what it is called in a file.
        name: the parameter's name.
        flag: whether it is true or false.
        repeatable: whether it is a list.
        value: what true means, for a flag.
    """

    key: str
    name: str
    flag: bool
    repeatable: bool
    value: bool = True


def load(context: typer.Context, path: Path | None) -> Path | None:
    """The callback of ``--config``: the file's options become the defaults of the command line.

    Raises:
        AptError: the file cannot be read, or sets what is no option.
    """
    if path is not None:
        known = {setting.key: setting for setting in _settings(context)}
        context.default_map = {known[k].name: v for k, v in _checked(path, known).items()}
    return path


def save(context: typer.Context, path: Path, chosen: Mapping[str, Any]) -> None:
    """Write the options of this command, with the defaults that were ``chosen``.

    Raises:
        AptError: there is a file that says something else, or it cannot be written.
    """
    import tomli_w

    text = tomli_w.dumps(dict(_given(context, chosen)))
    try:
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise AptError(f"{path} exists and is another one", "choose another --save-config")
        path.write_text(text, encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise AptError(f"cannot write {path}: {first_line(error)}", "choose another") from error


def _given(context: typer.Context, chosen: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The options that say something, by their keys."""
    defaults = {parameter.name: parameter.default for parameter in context.command.params}
    for setting in _settings(context):
        value = chosen.get(setting.name, context.params.get(setting.name))
        if setting.name in _NEVER_WRITTEN or value is None or value in ([], ()):
            continue
        if setting.flag and (value is not setting.value or value is defaults[setting.name]):
            continue
        yield setting.key, (True if setting.flag else _plain(value))


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [str(item) for item in value]
    return value if isinstance(value, int | float) else str(value)


def _settings(context: typer.Context) -> Iterator[_Setting]:
    """The command's options; one that has a name for yes and one for no is two."""
    for parameter in context.command.params:
        name = str(parameter.name)
        if name in _APART:
            continue
        flag, repeatable = bool(getattr(parameter, "is_flag", False)), bool(parameter.multiple)
        yield _Setting(_key(parameter.opts), name, flag, repeatable)
        if parameter.secondary_opts:
            yield _Setting(_key(parameter.secondary_opts), name, flag, repeatable, False)


def _key(spellings: list[str]) -> str:
    return max(spellings, key=len).lstrip("-")


def _checked(path: Path, known: Mapping[str, _Setting]) -> dict[str, Any]:
    """What a file sets, each value of a kind that its option can have."""
    found = {}
    for key, value in _read(path).items():
        key = key.replace("_", "-")
        if key not in known:
            raise unknown("option", key, known, f" ({path})")
        found[key] = _value(path, known[key], value)
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
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
