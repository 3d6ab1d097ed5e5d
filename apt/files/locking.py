"""Locks of files. The system releases the lock of a process that ends in any way."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from apt.errors import AptError


@contextmanager
def locked(
    path: Path, hint: str = "delete it", options: tuple[str, ...] = (), *, wait: bool = False
) -> Iterator[IO[str] | None]:
    """Hold the lock of a file, which is created if it does not exist. Links are not followed.

    Args:
        path: the file.
        hint, options: the advice if it cannot be opened, see `AptError`.
        wait: True to wait for another process that holds the lock.

    Yields:
        The open file; None if another process holds the lock.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        message = f"the lock {path} cannot be opened: {error.strerror}"
        raise AptError(message, hint, options) from error
    with open(descriptor, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
            return
        yield file
