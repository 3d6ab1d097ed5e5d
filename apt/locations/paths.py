"""What lies at a path, and what to say of one that cannot be looked at."""

import errno
import stat
from pathlib import Path
from typing import Literal

from apt.errors import AptError, shortened

Kind = Literal["file", "directory", "other"]

_ABSENT = (errno.ENOENT, errno.ENOTDIR)
# Faults of a path or of the machine, which no change of APT's code would mend.
_MENDABLE = {
    errno.EACCES: "ask for the right to read it, or use a copy",
    errno.EPERM: "ask for the right to use it, or use a copy",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ELOOP: "the link leads back to itself: remove it",
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room in your quota",
    errno.EROFS: "use a place that can be written to",
    errno.EMFILE: "raise the limit of open files: ulimit -n",
    errno.EIO: "the disk or the network drive fails",
    errno.ESTALE: "the network drive fails",
}


def kind_at(path: Path) -> Kind | None:
    """What is at ``path``, links followed; None where nothing is.

    Raises:
        AptError: it cannot be looked at, for want of rights or for its length.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise mendable(error) or error from error
    except ValueError as error:  # a NUL byte
        raise AptError(f"no path can be {str(path)!r}") from error
    if stat.S_ISDIR(mode):
        return "directory"
    return "file" if stat.S_ISREG(mode) else "other"


def mendable(error: OSError) -> AptError | None:
    """The line for a fault that the user can mend; None for one that may be a defect of APT."""
    if error.errno not in _MENDABLE or error.filename is None:
        return None
    name = shortened(str(error.filename))
    return AptError(f"cannot use {name}: {error.strerror}", _MENDABLE[error.errno])
