"""Renaming directories so that no moment exists at which one of them is lost.

Linux and macOS exchange two names in one step, and rename without replacing. Python's `os` has
neither, so the system's library is called.
"""

import ctypes
import errno
import os
import sys
from pathlib import Path

_HERE = -100 if sys.platform != "darwin" else -2  # AT_FDCWD: relative to the working directory
_FUNCTION = "renameat2" if sys.platform != "darwin" else "renameatx_np"
_NO_REPLACE, _EXCHANGE = (1, 2) if sys.platform != "darwin" else (4, 2)
# What systems and file systems say that do not know these renames.
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def rename_new(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``.

    Raises:
        FileExistsError: something is at ``target``.
    """
    if _system_rename(source, target, _NO_REPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    source.rename(target)


def exchange(first: Path, second: Path, spare: Path) -> None:
    """Exchange two directories of one file system.

    Args:
        first, second: the directories.
        spare: a name on their file system that is free. Where the system has no exchange,
            ``second`` is there for a moment.
    """
    if _system_rename(first, second, _EXCHANGE):
        return
    second.rename(spare)
    first.rename(second)
    spare.rename(first)


def _system_rename(source: Path, target: Path, how: int) -> bool:
    """Rename in one call of the system; whether it knows how."""
    function = getattr(ctypes.CDLL(None, use_errno=True), _FUNCTION, None)
    if function is None:
        return False
    if not function(_HERE, os.fsencode(source), _HERE, os.fsencode(target), how):
        return True
    code = ctypes.get_errno()
    if code in _UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))
