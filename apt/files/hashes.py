"""The SHA-256 of the files of a directory, as the report of an output lists them."""

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path


def file_hashes(directory: Path, without: Collection[str] = ()) -> dict[str, str]:
    """The SHA-256 of every file of a directory, by its relative path.

    Args:
        directory: the directory.
        without: the relative paths of files that are left out.
    """
    paths = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*")}
    return {n: sha256(p) for n, p in sorted(paths.items()) if p.is_file() and n not in without}


def changed_files(directory: Path, hashes: Mapping[str, str]) -> list[str]:
    """The files that are missing, or whose SHA-256 differs from the known one.

    Args:
        directory: the directory.
        hashes: the hashes by relative path; an empty text for a file whose hash is not known.
    """
    return [name for name, digest in hashes.items() if not _is_same(directory / name, digest)]


def _is_same(path: Path, digest: str) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    return not digest or sha256(path) == digest


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
