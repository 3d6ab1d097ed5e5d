"""Rows of a comparison that processes divide among themselves.

Each row has a lock file beside the results. The system releases the lock of a process that ends,
so the row of a killed process is free again.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from apt.errors import AptError

FOLDER = ".claims"


@contextmanager
def claimed(folder: Path, key: str, *, wait: bool) -> Iterator[bool]:
    """Claim a row. While True is yielded, no other process measures it.

    Args:
        folder: the folder of the comparison.
        key: the key of the row.
        wait: True to wait for another process that measures the row.

    Yields:
        False if another process measures it.
    """
    path = folder / FOLDER / hashlib.sha256(key.encode()).hexdigest()[:16]
    with _opened(path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _opened(path: Path) -> IO[str]:
    """Open the lock file of a row; links are not followed."""
    try:
        path.parent.mkdir(exist_ok=True)
        return open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+")
    except OSError as error:
        raise AptError(
            f"the lock {path} cannot be opened: {error.strerror}",
            f"delete {path.parent}, or choose another output",
            ("output",),
        ) from error
