"""The kind of file at a path, and messages for paths that cannot be used."""

import errno
import stat
from pathlib import Path
from typing import Literal

from apt.errors import AptError, shortened

Kind = Literal["file", "directory", "other"]

_ABSENT = (errno.ENOENT, errno.ENOTDIR)
# Errors of a path or of the machine, which are not defects of APT, with their remedies.
_REMEDIES = {
    errno.EACCES: "ask for permission to read it, or use a copy",
    errno.EPERM: "ask for permission to use it, or use a copy",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ELOOP: "the link leads back to itself: remove it",
    errno.ENOSPC: "free space on that disk",
    errno.EDQUOT: "free space in your quota",
    errno.EROFS: "use a place that is writable",
    errno.EMFILE: "raise the limit of open files: ulimit -n",
    errno.EIO: "check the disk or the network drive",
    errno.ESTALE: "check the network drive",
}


def expanded(path: str | Path) -> Path:
    """The path with ``~`` replaced by the home directory; raises `AptError` without one."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = shortened(Path(path).parts[0])
        raise AptError(f"{user} is no user's home directory", "check the path") from error


def portable(reference: str) -> str:
    """A reference to a model or a text, without the parent folders of a local path."""
    path = expanded(reference)
    return path.resolve().name if path.is_absolute() or path.exists() else reference


def kind_at(path: Path) -> Kind | None:
    """The kind of file at ``path``, links followed, or None; raises `AptError` if unreadable."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise user_error(error) or error from error
    except ValueError as error:  # a NUL byte
        raise AptError(f"{str(path)!r} is not a path") from error
    if stat.S_ISDIR(mode):
        return "directory"
    return "file" if stat.S_ISREG(mode) else "other"


def user_error(error: OSError) -> AptError | None:
    """The message for an error that the user can correct; None for a possible defect of APT."""
    if error.errno not in _REMEDIES or error.filename is None:
        return None
    name = shortened(str(error.filename))
    return AptError(f"cannot use {name}: {error.strerror}", _REMEDIES[error.errno])
