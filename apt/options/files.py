"""Options in TOML files. The keys are the flags without their leading dashes, and ``model``."""

import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from apt.errors import AptError, first_line, unknown_name
from apt.files.writing import check_file, write_file
from apt.options.declaration import Declared, Options, warn_renamed


def read_options(path: Path, kinds: Sequence[type[Options]]) -> dict[str, Any]:
    """The values of options in a file, by the names of their fields.

    Args:
        path: the file.
        kinds: the classes of the options.

    Raises:
        AptError: the file cannot be read, has an unknown key, or a value of another type.
    """
    keys = {
        key: (declared, meaning)
        for kind in kinds
        for declared in kind.OPTIONS
        for key, meaning in _keys(declared)
    }
    values: dict[str, Any] = {}
    for name, entry in _read_toml(path).items():
        key = name.replace("_", "-")
        if key not in keys:
            current = [other for other, (declared, _) in keys.items() if other != _former(declared)]
            raise unknown_name("option", key, current, f" ({path})")
        declared, meaning = keys[key]
        if key == _former(declared):
            warn_renamed(f"{key} in {path}", declared.flags[0].lstrip("-"))
        if meaning is None:
            values[declared.name] = _value(f"{key} in {path}", declared, entry)
        elif not isinstance(entry, bool):
            raise AptError(f"{key} in {path} is neither true nor false")
        elif entry or meaning in (True, False):
            chosen = meaning if entry else not meaning
            if values.setdefault(declared.name, chosen) != chosen:
                raise AptError(f"{key} in {path} contradicts another line", "leave one of them out")
    return values


def write_options(path: Path, options: Options, inputs: Sequence[Path] = ()) -> None:
    """Write options to a file.

    Args:
        path: the file.
        options: the options. Options for one call only are left out.
        inputs: the files and directories that the command reads. The file must not be inside.

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


def _keys(declared: Declared) -> Iterator[tuple[str, Any]]:
    """The keys of an option, each with the value that ``true`` means; None for a plain value."""
    if not declared.option.saved:
        return
    yes, no = declared.flags
    if declared.option.switches:
        yield from ((flag.lstrip("-"), value) for flag, value, _ in declared.option.switches)
    elif declared.kind is bool:
        yield from ((flag.lstrip("-"), value) for flag, value in ((yes, True), (no, False)) if flag)
    else:
        yield declared.name if declared.option.positional else yes.lstrip("-"), None
        if former := _former(declared):
            yield former, None


def _former(declared: Declared) -> str:
    return declared.option.formerly.replace("_", "-")


def _entries(options: Options) -> Iterator[tuple[str, Any]]:
    """The entries of a file: options with a value, and flags that differ from their default."""
    for declared in options.OPTIONS:
        value = getattr(options, declared.name)
        for key, meaning in _keys(declared):
            if meaning is not None:
                if value is meaning and value is not declared.default:
                    yield key, True
            elif value is not None and value not in ((), {}) and key != _former(declared):
                yield key, _toml_value(declared, value)


def _toml_value(declared: Declared, value: Any) -> Any:
    if declared.repeatable:
        return list(map(str, declared.option.text(value) if declared.option.read else value))
    return value if isinstance(value, int | float) else str(value)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows adds a BOM
    except (OSError, ValueError, RecursionError) as error:
        raise AptError(
            f"{path} cannot be read: {first_line(error)}", 'write lines such as pattern = "2:4"'
        ) from error


def _value(name: str, declared: Declared, entry: Any) -> Any:
    """The value of an option, from its entry in TOML."""
    items = entry if isinstance(entry, list) and declared.repeatable else [entry]
    if any(isinstance(item, bool) or not isinstance(item, str | int | float) for item in items):
        expected = "a list of strings" if declared.repeatable else "a string or a number"
        raise AptError(f"{name} is not {expected}")
    if declared.option.read is not None:
        texts = [str(item) for item in items]
        return declared.option.read(texts if declared.repeatable else texts[0])
    kind: Any = get_args(declared.kind)[0] if get_origin(declared.kind) is tuple else declared.kind
    if kind not in (int, float, Path) or str in declared.kinds:
        kind = str
    values = tuple(_converted(name, kind, item) for item in items)
    return values if declared.repeatable else values[0]


def _converted(name: str, kind: type, item: str | float) -> Any:
    if kind is int and isinstance(item, float):
        raise AptError(f"{name} is {item}, not a whole number")
    try:
        return Path(str(item)) if kind is Path else kind(item)
    except ValueError as error:
        raise AptError(f"{name} is '{item}', not a number") from error
