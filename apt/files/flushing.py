"""Flushing of files and folders to disk, so that they survive a power cut."""

import os
from contextlib import suppress
from pathlib import Path


def flush(path: Path) -> None:
    """Flush a file, or a folder with everything in it, and its name in the folder above."""
    content = path.rglob("*") if path.is_dir() else ()
    for item in (*content, path):
        if item.is_dir():
            flush_folder(item)
        elif not item.is_symlink():
            with item.open("rb") as file:
                os.fsync(file.fileno())
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder, if its file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
