"""Options in TOML files. The keys are the flags without their leading dashes, and ``model``."""

import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from apt.errors import AptError, first_line, unknown
from apt.files.writing import check_file, write_file
from apt.options.declaration import Declared, Options, warn_renamed


def read_options(path: Path, kinds: Sequence[type[Options]]) -> dict[str, Any]:
    """The values in a file for the options of these classes, by the names of the fields.

    Raises:
        AptError: the file cannot be read, has an unknown key, or a value of another type.
    """
    known = {
        key: (one, value) for kind in kinds for one in kind.OPTIONS for key, value in _keys(one)
    }
    values: dict[str, Any] = {}
    for written, raw in _read(path).items():
        key = written.replace("_", "-")
        if key not in known:
            current = {name: one for name, (one, _) in known.items() if name != _former(one)}
            raise unknown("option", key, current, f" ({path})")
        one, value = known[key]
        if key == _former(one):
            warn_renamed(f"{key} in {path}", one.flags[0].lstrip("-"))
        if value is None:
            values[one.name] = _value(f"{key} in {path}", one, raw)
        elif not isinstance(raw, bool):
            raise AptError(f"{key} in {path} is neither true nor false")
        elif raw or value in (True, False):
            chosen = value if raw else not value
            if values.setdefault(one.name, chosen) != chosen:
                raise AptError(f"{key} in {path} contradicts another line", "leave one of them out")
    return values


def write_options(path: Path, options: Options, inputs: Sequence[Path] = ()) -> None:
    """Write options to a file.

    Args:
        path: the file.
        options: the options. Those that are for one call only are left out.
        inputs: what the command reads; the file must not be inside.

    Raises:
        AptError: the file exists with other content, or cannot be written.
    """
    import tomli_w

    text = tomli_w.dumps(dict(_entries(options)))
    try:
        same = path.is_file() and path.read_text(encoding="utf-8") == text
    except (OSError, UnicodeError):
        same = False
    check_file(path, overwrite=same or None, inputs=inputs, options=("save_config",))
    write_file(path, text, overwrite=same)


def _keys(one: Declared) -> Iterator[tuple[str, Any]]:
    """The keys of an option, with the value that ``true`` stands for; None for a plain value."""
    if not one.option.saved:
        return
    yes, no = one.flags
    if one.option.switches:
        yield from ((flag.lstrip("-"), value) for flag, value, _ in one.option.switches)
    elif one.kind is bool:
        yield from ((flag.lstrip("-"), value) for flag, value in ((yes, True), (no, False)) if flag)
    else:
        yield one.name if one.option.positional else yes.lstrip("-"), None
        if former := _former(one):
            yield former, None


def _former(one: Declared) -> str:
    return one.option.formerly.replace("_", "-")


def _entries(options: Options) -> Iterator[tuple[str, Any]]:
    """The entries of a file: all options that have a value, and flags that are not the default."""
    for one in options.OPTIONS:
        value = getattr(options, one.name)
        for key, meaning in _keys(one):
            if meaning is not None:
                if value is meaning and value is not one.default:
                    yield key, True
            elif value is not None and value not in ((), {}) and key != _former(one):
                yield key, _toml(one, value)


def _toml(one: Declared, value: Any) -> Any:
    if one.repeatable:
        return [str(item) for item in (one.option.text(value) if one.option.read else value)]
    return value if isinstance(value, int | float) else str(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows adds a BOM
    except (OSError, ValueError, RecursionError) as error:
        raise AptError(
            f"{path} cannot be read: {first_line(error)}", 'write lines such as pattern = "2:4"'
        ) from error


def _value(name: str, one: Declared, raw: Any) -> Any:
    """The value of an option, from what TOML has read."""
    items = raw if isinstance(raw, list) and one.repeatable else [raw]
    if any(isinstance(item, bool) or not isinstance(item, str | int | float) for item in items):
        kind = "a list of strings" if one.repeatable else "a string or a number"
        raise AptError(f"{name} is not {kind}")
    if one.option.read is not None:
        texts = [str(item) for item in items]
        return one.option.read(texts if one.repeatable else texts[0])
    kind = get_args(one.kind)[0] if get_origin(one.kind) is tuple else one.kind
    made = [
        _plain(name, kind if kind in (int, float, Path) and str not in one.kinds else str, item)
        for item in items
    ]
    return tuple(made) if one.repeatable else made[0]


def _plain(name: str, kind: type, item: str | float) -> Any:
    if kind is int and isinstance(item, float):
        raise AptError(f"{name} is {item}, not a whole number")
    try:
        return Path(str(item)) if kind is Path else kind(item)
    except ValueError as error:
        raise AptError(f"{name} is '{item}', not a number") from error
