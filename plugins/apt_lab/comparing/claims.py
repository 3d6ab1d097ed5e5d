"""Rows of a comparison that processes divide among themselves.

Each row has a lock file beside the results; the row of a killed process is free again.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apt.errors import AptError
from apt.files.locking import locked

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
    place = folder / FOLDER
    hint = f"delete {place}, or choose another output"
    try:
        place.mkdir(exist_ok=True)
    except OSError as error:
        fault = f"the folder {place} of the locks cannot be opened: {error.strerror}"
        raise AptError(fault, hint, ("output",)) from error
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    with locked(place / name, hint, ("output",), wait=wait) as lock:
        yield lock is not None
