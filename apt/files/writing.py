"""Writing of single files: in one step, and without replacing other files unless requested.

Commands check the path of a file before their work, by `check_file`, and write it at the end.
"""

import os
import secrets
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from apt.errors import AptError, first_line
from apt.files.flushing import flush_folder
from apt.files.renaming import rename_new

_CHOOSE_ANOTHER = "choose another file"


def check_file(
    path: Path,
    *,
    overwrite: bool | None = None,
    inputs: Sequence[Path] = (),
    options: Iterable[str] = (),
) -> None:
    """Raise if a file cannot be written.

    Args:
        path: the file.
        overwrite: True if an existing regular file may be replaced; None if the command has no
            option for it.
        inputs: files and directories that the command reads; the file must not be inside of them.
        options: the options that name the file, for the message.

    Raises:
        AptError: the folder does not exist or cannot be written, the path is inside an input, or
            the path exists and is a link, a file that may not be replaced, or no regular file.
    """
    try:
        problem, hint = _problem(path, overwrite, inputs)
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error, options) from error
    if problem:
        extra = ("overwrite",) if hint.startswith("overwrite") else ()
        raise AptError(f"{path} {problem}", hint, (*options, *extra))


def _problem(path: Path, overwrite: bool | None, inputs: Sequence[Path]) -> tuple[str, str]:
    """The reason why a file cannot be written, and the remedy; two empty texts if it can be."""
    folder = path.absolute().parent
    if not folder.is_dir():
        return "cannot be written: its folder does not exist", "create it first"
    real = Path(os.path.realpath(folder)) / path.name
    for place in (Path(os.path.realpath(given_path)) for given_path in inputs):
        if real == place or place in real.parents:
            return f"is inside an input of the run, {place}", _CHOOSE_ANOTHER
    if not os.access(folder, os.W_OK | os.X_OK):
        return "cannot be written: no permission in its folder", _CHOOSE_ANOTHER
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return "", ""
    if stat.S_ISLNK(mode):
        return "is a link, and is not followed", f"delete it, or {_CHOOSE_ANOTHER}"
    if not stat.S_ISREG(mode):
        return "exists and is not a regular file", _CHOOSE_ANOTHER
    if overwrite:
        return "", ""
    return "exists", _CHOOSE_ANOTHER if overwrite is None else f"overwrite it, or {_CHOOSE_ANOTHER}"


def write_file(path: Path, content: str | bytes, *, overwrite: bool = False) -> None:
    """Write a file in one step: after an error, an existing file is unchanged.

    Args:
        path: the file.
        content: the content; a text is encoded as UTF-8.
        overwrite: True if an existing regular file may be replaced.

    Raises:
        AptError: see `check_file`; or the disk is full.
    """
    check_file(path, overwrite=overwrite)
    partial = path.with_name(f".apt-{secrets.token_hex(8)}")
    try:
        _write(partial, content.encode() if isinstance(content, str) else content)
        if overwrite:
            os.replace(partial, path)
        else:
            rename_new(partial, path)
        flush_folder(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def _write(path: Path, data: bytes) -> None:
    """Create a file, and flush it to disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _cannot_write(path: Path, error: Exception, options: Iterable[str] = ()) -> AptError:
    reason = getattr(error, "strerror", None) or first_line(error)
    return AptError(f"cannot write {path}: {reason}", _CHOOSE_ANOTHER, options)
