"""Atomic renaming of directories.

Linux and macOS can exchange two names in one step, and can rename without replacing. Python's `os`
has neither function, so the system library is called.
"""

import ctypes
import errno
import os
import sys
from pathlib import Path

_HERE = -100 if sys.platform != "darwin" else -2  # AT_FDCWD: relative to the working directory
_FUNCTION = "renameat2" if sys.platform != "darwin" else "renameatx_np"
_NO_REPLACE, _EXCHANGE = (1, 2) if sys.platform != "darwin" else (4, 2)
# The errors of systems and file systems without these renames.
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


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
        spare: an unused name on the same file system. If the system has no exchange, ``second``
            gets this name for a moment.
    """
    if _system_rename(first, second, _EXCHANGE):
        return
    second.rename(spare)
    first.rename(second)
    spare.rename(first)


def _system_rename(source: Path, target: Path, flags: int) -> bool:
    """Rename in one system call; False if the system does not support it."""
    function = getattr(ctypes.CDLL(None, use_errno=True), _FUNCTION, None)
    if function is None:
        return False
    if not function(_HERE, os.fsencode(source), _HERE, os.fsencode(target), flags):
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))
